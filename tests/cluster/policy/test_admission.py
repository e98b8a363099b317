"""Whose turn it is for a place in a pack, and when a job's owner counts as gone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from polygraft.cluster.model import FileId, Job, JobSpec, Limits, TenantId
from polygraft.cluster.policy.admission import in_turn, stop_reason, turn
from polygraft.cluster.policy.standing import Standing
from polygraft.cluster.states import JobState, Reason
from tests.cluster.builders import make_job


def of(tenant: str, *names: str, at: float, running: bool = False) -> list[Job]:
    state, pack = (JobState.RUNNING, "pack-1") if running else (JobState.QUEUED, None)
    return [
        make_job(name, tenant=TenantId(tenant), created_at=at + age, state=state, pack=pack)
        for age, name in enumerate(names)
    ]


def ordered(*jobs: list[Job], now: float = 100.0, without: str = "") -> list[str]:
    standing = Standing.of(job for some in jobs for job in some)
    (queues,) = standing.queues.values()
    limits = Limits(overtake_s=60.0, patience_s=600.0)
    turns = in_turn(queues, standing.entered, Counter(), {TenantId(without)}, limits, now=now)
    return [job.id.removeprefix("ftjob-") for job in turns]


def test_the_tenant_with_fewer_jobs_in_packs_is_first_however_old_the_other_ones_are() -> None:
    running = of("ann", "r0", "r1", at=0.0, running=True), of("bob", "r2", at=0.0, running=True)
    assert ordered(*running, of("ann", "a", at=10.0), of("bob", "b", at=20.0)) == ["b", "a"]
    three = of("ann", "a", at=10.0), of("bob", "b", at=20.0), of("eve", "e", at=30.0)
    assert ordered(*running, *three) == ["e", "b", "a"]


def test_each_job_that_is_placed_counts_as_one_more_in_a_pack() -> None:
    bob = of("bob", "r", at=0.0, running=True), of("bob", "b0", "b1", at=50.0)
    assert ordered(of("ann", "a0", "a1", "a2", at=10.0), *bob) == ["a0", "a1", "b0", "a2", "b1"]


def test_a_tenants_next_job_is_compared_with_others_and_not_its_last() -> None:
    ann = of("ann", "a0", "a1", at=10.0), of("ann", "a2", at=90.0)
    assert ordered(*ann, of("bob", "r", at=0.0, running=True), of("bob", "b", at=50.0)) == ["a0", "a1", "b", "a2"]


def test_a_priority_is_worth_ten_minutes() -> None:
    spec = JobSpec(backbone="b", training_file=FileId("f"), priority=2)
    assert turn(make_job("a", created_at=1300.0, spec=spec)) == (100.0, 1300.0, "ftjob-a")


def test_a_job_that_was_overtaken_for_long_goes_before_all_others() -> None:
    running, bob = of("ann", "r", at=0.0, running=True), of("bob", "b", at=1.0)
    (blocked,) = of("ann", "a", at=20.0)
    overtaken = [replace(blocked, blocked_at=30.0)]
    assert ordered(running, bob, overtaken, now=90.0) == ["a", "b"]
    assert ordered(running, bob, overtaken, now=89.9) == ["b", "a"]
    (later,) = of("eve", "e", at=5.0)
    assert ordered(running, overtaken, [replace(later, blocked_at=29.0)], now=100.0) == ["e", "a"]


@pytest.mark.parametrize(
    ("admitted", "created", "late"), [(100.0, 20.0, 700.0), (100.0, 150.0, 750.0), (None, 0.5, 600.5)]
)
def test_a_tenant_that_got_nobody_in_for_long_has_one_turn_before_all_others(
    admitted: float | None, created: float, late: float
) -> None:
    (one,) = of("ann", "r", at=0.0, running=True)
    running, ann = [replace(one, admitted_at=admitted)], of("ann", "a0", "a1", at=created)
    bob = of("bob", "b0", "b1", at=created + 50.0)
    assert ordered(running, ann, bob, now=late) == ["a0", "b0", "b1", "a1"]
    assert ordered(running, ann, bob, now=late - 0.1) == ["b0", "a0", "b1", "a1"]


def test_who_is_left_out_has_no_turns_and_the_others_theirs() -> None:
    three = of("ann", "a", at=10.0), of("bob", "b", at=20.0), of("eve", "e", at=30.0)
    assert ordered(*three, without="ann") == ["b", "e"]


def test_an_owner_is_lost_after_its_lease_and_not_at_its_end() -> None:
    job = make_job("a", lease_until=50.0)
    assert stop_reason(job, 50.0) is None
    assert stop_reason(job, 50.1) is Reason.OWNER_LOST
