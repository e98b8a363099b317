"""Where the jobs stand: by example, and that what is kept up job by job is what one pass over all of them gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.cluster.model import Job, JobId, PackId, TenantId
from polygraft.cluster.policy.budget import STATE_BYTES
from polygraft.cluster.policy.standing import Kind, Load, Standing
from polygraft.cluster.states import JobState, Reason
from tests.cluster.builders import make_job, running

P, Q = PackId("pack-p"), PackId("pack-q")
T = TenantId("t")
JOBS = {
    "waits": make_job("a", reason=Reason.TURN),
    "knows no reason yet": make_job("a", reason=None),
    "is moving": make_job("a", moving_to=Q, reason=Reason.MOVING),
    "has an owner": make_job("a", lease_until=5.0, reason=Reason.PACK_FULL),
    "is asked to stop": running("a", cancel_requested=True, admitted_at=2.0),
    "trains": running("a", parameters=7, admitted_at=2.0),
    "trains and leaves": running("a", moving_to=Q, admitted_at=2.0),
    "is over": replace(running("a"), state=JobState.SUCCEEDED),
}


def test_a_waiting_job_stands_in_its_tenants_queue_in_its_turn() -> None:
    old, new = make_job("z", created_at=1.0, reason=Reason.PACK_MEMORY), make_job("a", created_at=2.0)
    standing = Standing.of((new, old))
    assert standing.queues == {Kind("b", 1): {T: [old, new]}}
    assert standing.restless == {new.id: new}, "nobody has told it why it waits"
    assert not standing.active and not standing.entered and not standing.loads and not standing.over


def test_a_job_in_a_pack_counts_there_and_one_that_moves_in_both() -> None:
    here, leaves = running("a", parameters=3, admitted_at=9.0), running("b", parameters=4, moving_to=Q, admitted_at=8.0)
    comes = make_job("c", parameters=5, moving_to=Q)
    standing = Standing.of((here, leaves, comes))
    assert (standing.load(P).bytes, standing.load(Q).bytes) == (7 * STATE_BYTES, 9 * STATE_BYTES)
    assert (standing.count(P), standing.count(Q), standing.count(PackId("pack-r"))) == (2, 2, 0)
    assert standing.load(PackId("pack-r")) == Load()
    assert standing.entered == {T: [(8.0, leaves.id), (9.0, here.id)]}
    assert standing.arriving == {comes.id: comes} and standing.active == {T: {here.id: here, leaves.id: leaves}}
    assert (standing.load(P).jobs, standing.load(Q).jobs) == (
        {here.id: here, leaves.id: leaves},
        {leaves.id: leaves, comes.id: comes},
    )
    standing.change(here, None)
    assert standing.active == {T: {leaves.id: leaves}} and standing.entered == {T: [(8.0, leaves.id)]}


@pytest.mark.parametrize(
    ("name", "risky"), [("trains", False), ("has an owner", True), ("is asked to stop", True), ("is over", False)]
)
def test_only_an_unfinished_job_that_may_have_to_stop_is_looked_at_each_round(name: str, risky: bool) -> None:
    job = JOBS[name]
    standing = Standing.of([job])
    assert standing.at_risk == ({job.id: job} if risky else {})
    assert standing.over == ({job.id: job} if name == "is over" else {})


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_is_forgotten_leaves_nothing_behind(name: str) -> None:
    standing = Standing.of([JOBS[name]])
    assert standing != Standing()
    standing.change(JOBS[name], None)
    assert standing == Standing()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([*JOBS, None])), max_size=25))
def test_what_is_kept_up_job_by_job_is_what_a_pass_over_all_gives(changes: list[tuple[str, str | None]]) -> None:
    standing, present = Standing(), dict[JobId, Job]()
    for job, name in changes:
        before = present.pop(JobId(f"ftjob-{job}"), None)
        after = _called(job, JOBS[name]) if name is not None else None
        if after is not None:
            present[after.id] = after
        standing.change(before, after)
        assert standing == Standing.of(present.values())


def _called(name: str, like: Job) -> Job:
    return replace(like, id=JobId(f"ftjob-{name}"), tenant=TenantId("u") if name == "c" else T)
