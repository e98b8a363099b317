"""Which backbones replicas hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polygraft.cluster.decisions import Decision, LoadBackbone, UnloadBackbone
from polygraft.cluster.model import Job, Limits, Snapshot
from polygraft.cluster.policy.cycle import decide
from polygraft.cluster.policy.loading import is_wanted
from polygraft.cluster.policy.loading import loading as loading_by
from polygraft.cluster.policy.standing import Standing
from polygraft.cluster.states import Reason
from tests.cluster.builders import make_backbone, make_job, make_snapshot


def loading(snapshot: Snapshot) -> tuple[Decision, ...]:
    return loading_by(snapshot, Standing.of(snapshot.jobs.values()))


def fleet(unload_s: float) -> Snapshot:
    return make_snapshot(
        backbones=(
            make_backbone("asked", asked_at=95.0),
            make_backbone("busy", asked_at=95.0, loaded=True),
            make_backbone("idle", asked_at=30.0, loaded=True),
            make_backbone("never"),
            make_backbone("past", asked_at=30.0),
        ),
        limits=Limits(unload_s=unload_s),
        now=100.0,
    )


def test_what_was_asked_lately_is_loaded_and_what_was_not_is_unloaded() -> None:
    assert loading(fleet(60.0)) == (LoadBackbone("asked"), UnloadBackbone("idle", 30.0))
    assert decide(fleet(60.0)) == loading(fleet(60.0))


def test_without_a_time_nothing_that_was_ever_asked_is_unloaded() -> None:
    assert loading(fleet(0.0)) == (LoadBackbone("asked"), LoadBackbone("past"))
    assert is_wanted(make_backbone("b", asked_at=0.5), now=100.0, unload_s=0.0)


@pytest.mark.parametrize(("asked_at", "wanted"), [(0.0, False), (40.0, False), (40.1, True), (100.0, True)])
def test_it_is_wanted_for_so_long_after_it_was_asked(asked_at: float, wanted: bool) -> None:
    assert is_wanted(make_backbone("b", asked_at=asked_at), now=100.0, unload_s=60.0) is wanted


@pytest.mark.parametrize(
    ("job", "unloaded"),
    [
        (make_job(reason=Reason.NO_DEVICE), (UnloadBackbone("old", 400.0, Reason.NO_DEVICE),)),
        (make_job(reason=Reason.PACK_OPENING), ()),
        (make_job(reason=Reason.NO_DEVICE, pack="pack-p"), ()),
    ],
)
def test_the_one_that_was_asked_longest_ago_makes_room_for_a_job(
    job: Job, unloaded: tuple[UnloadBackbone, ...]
) -> None:
    resting = (make_backbone("old", asked_at=400.0, loaded=True), make_backbone("older", asked_at=300.0))
    asked = make_backbone("asked", asked_at=900.0, loaded=True)
    snapshot = make_snapshot(jobs=(job,), backbones=(asked, *resting), limits=Limits(unload_s=600.0), now=850.0)
    assert loading(snapshot) == (LoadBackbone("older"), *unloaded)
    assert loading(make_snapshot(jobs=(job,), backbones=(asked,), limits=Limits(unload_s=600.0), now=1000.0)) == ()


@pytest.mark.parametrize(("asked_at", "rests"), [(700.0, True), (700.1, False)])
def test_of_two_that_nobody_asks_now_one_makes_room(asked_at: float, rests: bool) -> None:
    loaded = [
        make_backbone(name, asked_at=at, loaded=True) for name, at in (("a", 710.0), ("b", asked_at), ("c", 720.0))
    ]
    snapshot = make_snapshot(jobs=(make_job(reason=Reason.NO_DEVICE),), backbones=tuple(loaded), now=850.0)
    assert loading(snapshot) == ((UnloadBackbone("b", 700.0, Reason.NO_DEVICE),) if rests else ())
    later = replace(snapshot, now=900.0)
    assert loading(later) == (UnloadBackbone("b", asked_at, Reason.NO_DEVICE),), "the one that was asked first"
