"""Whose turn it is for a place in a pack, and when a job's owner counts as gone."""

from __future__ import annotations

from collections import Counter

from polygraft.cluster.model import Job, Limits, TenantId
from polygraft.cluster.policy.admission import in_turn, stop_reason
from polygraft.cluster.policy.standing import Standing
from polygraft.cluster.states import JobState, Reason
from tests.cluster.builders import make_job


def of(tenant: str, *names: str, at: float, running: bool = False) -> list[Job]:
    state, pack = (JobState.RUNNING, "pack-1") if running else (JobState.QUEUED, None)
    return [
        make_job(name, tenant=TenantId(tenant), created_at=at + age, state=state, pack=pack)
        for age, name in enumerate(names)
    ]


def ordered(*jobs: list[Job]) -> list[str]:
    standing = Standing.of(job for some in jobs for job in some)
    (queues,) = standing.queues.values()
    turns = in_turn(queues, standing.active, Counter(), set(), Limits(), now=100.0)
    return [job.id.removeprefix("ftjob-") for job in turns]


def test_the_tenant_with_fewer_jobs_in_packs_is_first_however_old_the_other_ones_are() -> None:
    running = of("ann", "r0", "r1", at=0.0, running=True), of("bob", "r2", at=0.0, running=True)
    assert ordered(*running, of("ann", "a", at=10.0), of("bob", "b", at=20.0)) == ["b", "a"]
    three = of("ann", "a", at=10.0), of("bob", "b", at=20.0), of("eve", "e", at=30.0)
    assert ordered(*running, *three) == ["e", "b", "a"]


def test_each_job_that_is_placed_counts_as_one_more_in_a_pack() -> None:
    bob = of("bob", "r", at=0.0, running=True), of("bob", "b0", "b1", at=50.0)
    assert ordered(of("ann", "a0", "a1", "a2", at=10.0), *bob) == ["a0", "a1", "b0", "a2", "b1"]


def test_an_owner_is_lost_after_its_lease_and_not_at_its_end() -> None:
    job = make_job("a", lease_until=50.0)
    assert stop_reason(job, 50.0) is None
    assert stop_reason(job, 50.1) is Reason.OWNER_LOST
