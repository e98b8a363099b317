"""Jobs for which there is no pack, while packs of other kinds hold every device: after very long, packs drain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polygraft.cluster.decisions import Admit, ClosePack, Hold, Move, OpenPack
from polygraft.cluster.model import DeviceId, Job, JobId, Limits, Pack, PackId, Snapshot
from polygraft.cluster.policy.cycle import decide
from polygraft.cluster.states import PackState, Reason
from tests.cluster.builders import DEVICE_BYTES, make_job, make_pack, make_snapshot, running

P, Q = PackId("pack-p"), PackId("pack-q")
A, B, E = JobId("ftjob-a"), JobId("ftjob-b"), JobId("ftjob-e")
NEW = PackId("pack-100002")
HALF = DEVICE_BYTES // 2
LIMITS = Limits(max_jobs=2, patience_s=600.0)
STRANDED = make_job("a", backbone="c", created_at=1.0)  # for very long at 601
FRESH = make_job("b", created_at=600.0)
NO_DEVICE = Hold(A, Reason.NO_DEVICE)


def pack(name: str, *devices: str, **fields: object) -> Pack:
    return make_pack(name, devices=tuple(map(DeviceId, devices)), **fields)  # type: ignore[arg-type]


def inside(name: str, count: int, **fields: object) -> tuple[Job, ...]:
    return tuple(running(f"{name}{n}", name, **fields) for n in range(count))


def wanting(name: str, backbone: str, devices: int, created_at: float = 1.0) -> Job:
    spec = replace(make_job(backbone=backbone).spec, devices=devices)
    return make_job(name, spec=spec, created_at=created_at)


def two_packs(*jobs: Job, p: int = 2, q: int = 1, devices: int = 2, limits: Limits = LIMITS) -> Snapshot:
    """Open ones of backbone b, with so many jobs each."""
    packs = pack("p", "d"), pack("q", "d1")
    return make_snapshot(
        jobs=(*inside("p", p), *inside("q", q), *jobs), packs=packs, devices=devices, limits=limits, now=601.0
    )


def test_the_emptiest_pack_takes_no_more_jobs_and_the_others_go_on() -> None:
    snapshot = two_packs(STRANDED, FRESH)
    assert decide(snapshot) == (NO_DEVICE, Hold(B, Reason.PACK_FULL))
    assert decide(replace(snapshot, now=600.9)) == (NO_DEVICE, Admit(B, Q))


def test_it_is_closed_as_soon_as_it_is_empty_and_not_joined_before() -> None:
    assert decide(two_packs(STRANDED, p=1, q=0)) == (NO_DEVICE, ClosePack(Q, Reason.YIELDED))
    roomy = replace(LIMITS, max_jobs=4)
    assert decide(two_packs(STRANDED, limits=roomy)) == (NO_DEVICE,)
    assert decide(two_packs(limits=roomy)) == (Move(JobId("ftjob-q0"), Q, P),), "as it would be else"


def test_what_is_free_is_kept_for_a_job_that_needs_more() -> None:
    wide = wanting("a", "c", 2)
    snapshot = two_packs(wide, FRESH, devices=3)
    assert decide(snapshot) == (NO_DEVICE, Hold(B, Reason.PACK_FULL)), "one is free, one more is missing: q's"
    full = two_packs(wide, FRESH, q=2, devices=3)
    waits = full.jobs[B]
    assert decide(replace(full, now=600.0))[0] == OpenPack(NEW, "b", (DeviceId("d2"),), HALF), "nobody has waited long"
    assert decide(full) == (NO_DEVICE, Hold(waits.id, Reason.PACK_FULL))


def test_no_more_packs_drain_than_devices_are_missing() -> None:
    wide = tuple(replace(job, spec=replace(job.spec, devices=2)) for job in inside("w", 1))
    snapshot = make_snapshot(
        jobs=(*wide, *inside("p", 2), wanting("a", "c", 2), FRESH, wanting("e", "b", 2, created_at=600.0)),
        packs=(pack("w", "d", "d1"), pack("p", "d2")),
        devices=3,
        limits=replace(LIMITS, max_jobs=3),
        now=601.0,
    )
    assert decide(snapshot) == (NO_DEVICE, Admit(B, P), Hold(E, Reason.NO_DEVICE)), "w has two devices and is enough"


def test_as_many_packs_drain_as_devices_are_missing() -> None:
    snapshot = two_packs(wanting("a", "c", 2), FRESH, p=2, q=1, limits=replace(LIMITS, max_jobs=3))
    assert decide(snapshot) == (NO_DEVICE, Hold(B, Reason.NO_DEVICE)), "none of them takes it"


def test_a_kind_has_waited_as_long_as_the_oldest_of_its_tenants_jobs() -> None:
    late = make_job("e", tenant="u", backbone="c", created_at=600.0)
    assert decide(two_packs(STRANDED, late, FRESH)) == (NO_DEVICE, Hold(E, Reason.TURN), Hold(B, Reason.PACK_FULL))


def test_two_kinds_that_have_no_pack_drain_a_pack_each() -> None:
    snapshot = two_packs(STRANDED, wanting("e", "e", 1), FRESH)
    assert decide(snapshot) == (NO_DEVICE, Hold(E, Reason.NO_DEVICE), Hold(B, Reason.NO_DEVICE))


def test_nothing_drains_for_a_job_that_gets_a_pack_or_whose_last_one_failed_lately() -> None:
    snapshot = two_packs(STRANDED, FRESH, p=1, q=0, devices=3)
    assert decide(snapshot) == (
        OpenPack(NEW, "c", (DeviceId("d2"),), HALF),
        Hold(A, Reason.PACK_OPENING),
        Admit(B, P),
    )
    failed = pack("f", "d1", backbone="c", state=PackState.FAILED, closed_at=600.5, error="x")
    busy = two_packs(STRANDED, FRESH)
    lately = replace(busy, packs={**busy.packs, failed.id: failed})
    assert decide(lately) == (Hold(A, Reason.PACK_BACKOFF), Admit(B, Q))


@pytest.mark.parametrize(("now", "first"), [(601.0, "c"), (600.9, "b")])
def test_who_has_no_pack_for_very_long_gets_the_free_device_before_older_jobs_that_have_one(
    now: float, first: str
) -> None:
    older = make_job("b", created_at=0.5)
    snapshot = replace(two_packs(STRANDED, older, q=2, devices=3), now=now)
    opened = [one.backbone for one in decide(snapshot) if isinstance(one, OpenPack)]
    assert opened == [first]
