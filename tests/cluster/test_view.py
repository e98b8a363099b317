"""What is shown of a cluster is what its snapshot has, with the reason of every wait."""

from __future__ import annotations

from dataclasses import replace

from polygraft.cluster.model import PackId
from polygraft.cluster.size import Size
from polygraft.cluster.states import JobState, PackState, Reason
from polygraft.cluster.view import LoadView, view
from tests.cluster.builders import (
    DEVICE_BYTES,
    make_backbone,
    make_device,
    make_job,
    make_pack,
    make_replica,
    make_snapshot,
    running,
)

LOAD = LoadView(running=2, waiting=3, deferred=1, blocks=10, free_blocks=4, grafts=("g1", "g2"))


def test_everything_that_is_not_over_is_shown_where_it_is() -> None:
    jobs = (
        running("a"),
        make_job("c", created_at=3.0, reason=Reason.PACK_FULL),
        make_job("b", created_at=2.0),
        make_job("done", state=JobState.SUCCEEDED, pack=PackId("pack-p")),
    )
    packs = (make_pack(), make_pack("q", state=PackState.CLOSED))
    snapshot = make_snapshot(jobs=jobs, packs=packs, replicas=(make_replica("r"), make_replica("s")))
    backbone = make_backbone("b", sizes=(Size("serve.kv_bytes", 7, 5),))
    shown = view(replace(snapshot, backbones={"b": backbone}), {"r": LOAD}, at=9.0)
    (device,) = shown.devices
    expected = [("pack-p", DEVICE_BYTES // 2), ("r", DEVICE_BYTES // 4), ("s", DEVICE_BYTES // 4)]
    assert [(one.holder, one.bytes) for one in device.holders] == expected and device.free_bytes == 0
    assert [(pack.id, pack.jobs) for pack in shown.packs] == [("pack-p", ("ftjob-a",))]
    assert [replica.load for replica in shown.replicas] == [LOAD, None]
    assert [(one.job, one.reason) for one in shown.waiting] == [("ftjob-b", None), ("ftjob-c", Reason.PACK_FULL)]
    assert [(one.name, one.derived, one.used) for one in shown.backbones[0].sizes] == [("serve.kv_bytes", 7, 5)]
    assert shown.at == 9.0


def test_bytes_held_and_free_add_up_to_the_device_s() -> None:
    snapshot = make_snapshot(packs=(make_pack(bytes=1), make_pack("q", bytes=2)), replicas=(make_replica(bytes=3),))
    devices = {"d": make_device(), "e": make_device("e")}
    for device in view(replace(snapshot, devices=devices), {}, at=0.0).devices:  # type: ignore[arg-type]
        assert device.free_bytes + sum(one.bytes for one in device.holders) == device.bytes
