"""What a round does with jobs that no pack may take now, or that wait where their place is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from polygraft.cluster.decisions import Admit, CancelJob, Hold, OpenPack, Refuse
from polygraft.cluster.model import DeviceId, Job, JobId, Limits, Pack, PackId, Snapshot
from polygraft.cluster.policy.admission import stop_reason
from polygraft.cluster.policy.cycle import decide
from polygraft.cluster.states import JobState, PackState, Reason
from tests.cluster.builders import make_job, make_pack, make_snapshot, running

P, Q = PackId("pack-p"), PackId("pack-q")
A, B, C = JobId("ftjob-a"), JobId("ftjob-b"), JobId("ftjob-c")
PACKS = make_pack("p"), make_pack("q", devices=(DeviceId("d1"),))


def of(*jobs: Job, packs: tuple[Pack, ...] = PACKS, **limits: Any) -> Snapshot:
    return make_snapshot(jobs=jobs, packs=packs, devices=2, limits=Limits(**limits))


def test_a_job_whose_backbone_was_removed_is_refused() -> None:
    gone = replace(of(make_job("a", backbone="gone"), make_job("b")), backbones=of(make_job("b")).backbones)
    assert decide(gone) == (Refuse(A, Reason.NO_BACKBONE), Admit(B, P))


def test_a_job_is_tried_as_often_as_it_may_be() -> None:
    assert decide(of(make_job("a", attempts=1), max_attempts=2)) == (Admit(A, P),)
    assert decide(of(make_job("a", attempts=3), max_attempts=2)) == (Refuse(A, Reason.PACKS_FAILED),)


def test_what_a_round_gives_a_tenant_counts_in_it() -> None:
    jobs = make_job("a"), make_job("b", created_at=2.0), make_job("c", tenant="u", created_at=3.0)
    assert decide(of(*jobs, tenant_jobs=1)) == (Admit(A, P), Admit(C, P), Hold(B, Reason.TENANT_LIMIT))
    opened, *held = decide(of(*jobs, packs=(), tenant_jobs=1))
    assert isinstance(opened, OpenPack)
    assert held == [Hold(A, Reason.PACK_OPENING), Hold(C, Reason.PACK_OPENING), Hold(B, Reason.TENANT_LIMIT)]
    many = [make_job(f"{n}", created_at=1.0 + n) for n in range(4)]
    assert [type(one) for one in decide(of(*many, tenant_jobs=2))] == [Admit, Admit, Hold, Hold]
    assert [type(one) for one in decide(of(*many))] == [Admit] * 4, "without a limit nobody has one"


def test_a_job_that_waits_for_room_does_not_count_as_given() -> None:
    full = of(running("r", tenant="u"), make_job("a"), packs=(make_pack("p"),), max_jobs=1, tenant_jobs=1)
    alone = replace(full, devices={DeviceId("d"): full.devices[DeviceId("d")]})
    assert decide(alone) == (Hold(A, Reason.PACK_FULL),)
    more = make_job("b", created_at=2.0, spec=replace(make_job().spec, backbone="c"))
    both = replace(alone, jobs={**alone.jobs, B: more}, backbones={**of(make_job(), more).backbones})
    assert decide(both) == (Hold(A, Reason.PACK_FULL), Hold(B, Reason.NO_DEVICE)), "and b is not at its limit"


def test_a_job_between_two_packs_counts_once() -> None:
    left = make_job("a", moving_to=P, reason=Reason.MOVING, created_at=0.5)
    jobs = running("r"), left, make_job("b")
    assert decide(of(*jobs, tenant_jobs=2)) == (Admit(A, P), Hold(B, Reason.TENANT_LIMIT))
    closing = (make_pack("p", state=PackState.CLOSING), PACKS[1])
    assert decide(of(*jobs, packs=closing, tenant_jobs=2)) == (Admit(A, Q), Hold(B, Reason.TENANT_LIMIT))


def test_jobs_that_have_left_a_pack_are_admitted_before_all_that_wait_if_nobody_stops_them() -> None:
    def left(name: str, created_at: float, **fields: object) -> Job:
        return make_job(name, moving_to=P, reason=Reason.MOVING, created_at=created_at, **fields)  # type: ignore[arg-type]

    two = left("a", 9.0), left("b", 8.0), make_job("c")
    assert decide(of(*two)) == (Admit(B, P), Admit(A, P), Admit(C, P))
    stopped = left("a", 9.0, cancel_requested=True), left("b", 8.0), make_job("c")
    assert decide(of(*stopped)) == (CancelJob(A, None, Reason.REQUESTED), Admit(B, P), Admit(C, P))


def test_who_comes_after_a_job_that_is_cancelled_still_has_its_turn() -> None:
    assert decide(of(make_job("a", cancel_requested=True), make_job("b", created_at=2.0))) == (
        CancelJob(A, None, Reason.REQUESTED),
        Admit(B, P),
    )


def test_a_job_is_told_its_turn_by_its_own_kind() -> None:
    jobs = [
        make_job(name, backbone=backbone, created_at=at) for name, backbone, at in (("a", "b", 1.0), ("b", "c", 2.0))
    ]
    third, fourth = make_job("c", backbone="b", created_at=3.0), make_job("d", backbone="c", created_at=4.0)
    full = (running("r"), running("s", "q", backbone="c"))
    packs = (PACKS[0], replace(PACKS[1], backbone="c"))
    assert decide(of(*full, *jobs, third, fourth, packs=packs, max_jobs=1)) == (
        Hold(A, Reason.PACK_FULL),
        Hold(C, Reason.TURN),
        Hold(B, Reason.PACK_FULL),
        Hold(JobId("ftjob-d"), Reason.TURN),
    )


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (make_job(cancel_requested=True), Reason.REQUESTED),
        (running("a", cancel_requested=True, lease_until=1.0), Reason.REQUESTED),
        (running("a", stopping=True, lease_until=1.0), None),
        (replace(running("a", cancel_requested=True), state=JobState.FAILED), None),
        (make_job(), None),
    ],
)
def test_only_an_unfinished_job_that_is_not_stopping_yet_is_stopped(job: Job, reason: Reason | None) -> None:
    assert stop_reason(job, now=10.0) is reason
