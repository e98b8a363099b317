"""What always holds while a fleet of packs takes in jobs, loses packs, moves jobs and ends."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.cluster.events import JobCancelRequested, JobHeld, JobMoving, JobSucceeded, PackOpening
from polygraft.cluster.model import JobId, Limits
from polygraft.cluster.policy.budget import STATE_BYTES, bytes_of
from polygraft.cluster.policy.standing import Standing
from polygraft.cluster.states import JobState, PackState, Reason
from tests.cluster.builders import make_job
from tests.cluster.policy.fleet import Fleet

LIMITS = Limits(max_jobs=4, pack_bytes=100 * STATE_BYTES, opening_s=3.0, overtake_s=10.0, patience_s=30.0, idle_s=5.0)
QUIET_S = 4000  # after which nothing may be left of a fleet that nobody sends jobs to


def check(fleet: Fleet) -> None:
    """The budgets, and that every job that waits says why."""
    snapshot = fleet.snapshot
    for device in snapshot.devices:
        assert snapshot.free_bytes(device) >= 0
    for pack in snapshot.packs.values():
        here = [job for job in snapshot.jobs.values() if pack.id in (job.pack, job.moving_to) and not job.final]
        assert len(here) <= fleet.limits.max_jobs
        assert sum(map(bytes_of, here)) <= fleet.limits.pack_bytes
        assert all(job.spec.backbone == pack.backbone and job.spec.devices == len(pack.devices) for job in here)
    in_packs = Counter(job.tenant for job in snapshot.jobs.values() if job.active)
    assert not fleet.limits.tenant_jobs or max(in_packs.values(), default=0) <= fleet.limits.tenant_jobs
    assert all(job.reason is not None for job in snapshot.jobs.values() if job.waiting)


@dataclass(frozen=True)
class Comes:
    """A job that is submitted."""

    tenant: str
    backbone: str
    parameters: int
    work_s: int
    priority: int
    devices: int


@dataclass(frozen=True)
class Stops:
    """The tenant of a job that was submitted cancels it."""

    which: int


@dataclass(frozen=True)
class Dies:
    """A pack is lost."""

    which: int


JOBS = st.builds(
    Comes,
    tenant=st.sampled_from("xyz"),
    backbone=st.sampled_from("bbc"),
    parameters=st.integers(1, 100),
    work_s=st.integers(1, 60),
    priority=st.integers(-2, 2),
    devices=st.sampled_from([1, 1, 1, 2]),
)
HAPPENS = st.one_of(JOBS, JOBS, st.builds(Stops, st.integers(0, 50)), st.builds(Dies, st.integers(0, 5)), st.none())


@settings(max_examples=60)
@given(st.lists(HAPPENS, max_size=40), st.integers(2, 4), st.sampled_from([0, 3]), st.booleans())
def test_no_job_is_lost_or_doubled_nobody_starves_and_every_wait_has_a_reason(
    happens: list[Comes | Stops | Dies | None], devices: int, tenant_jobs: int, paced: bool
) -> None:
    fleet = Fleet(replace(LIMITS, tenant_jobs=tenant_jobs), devices, paced)
    submitted: list[JobId] = []
    for what in happens:
        match what:
            case Comes():
                job = make_job(
                    f"{len(submitted)}",
                    tenant=what.tenant,
                    parameters=what.parameters,
                    created_at=fleet.now,
                    reason=Reason.TURN,
                    spec=replace(make_job(backbone=what.backbone).spec, priority=what.priority, devices=what.devices),
                )
                submitted.append(job.id)
                fleet.submit(job, float(what.work_s))
            case Stops(which=which) if submitted:
                found = fleet.snapshot.jobs[submitted[which % len(submitted)]]
                if not found.final:
                    fleet.write(JobCancelRequested(job=found.id, at=fleet.now))
            case Dies(which=which):
                alive = sorted(pack.id for pack in fleet.snapshot.packs.values() if not pack.final)
                if alive:
                    fleet.fail(alive[which % len(alive)])
        fleet.tick(lambda: check(fleet))
    for _ in range(QUIET_S):
        jobs, packs = fleet.snapshot.jobs.values(), fleet.snapshot.packs.values()
        if all(job.final for job in jobs) and all(pack.final for pack in packs):
            break
        fleet.tick(lambda: check(fleet))
    assert all(pack.final for pack in fleet.snapshot.packs.values()), "a pack without jobs is closed"
    ends = Counter(one.event.job for one in fleet.log if isinstance(one.event, JobSucceeded))
    states = {job: fleet.snapshot.jobs[job].state for job in submitted}
    assert all(state in (JobState.SUCCEEDED, JobState.CANCELLED) for state in states.values()), states
    assert ends == Counter(job for job, state in states.items() if state is JobState.SUCCEEDED)
    assert fleet.replayed() == fleet.snapshot
    assert Standing.of(fleet.snapshot.jobs.values()) == fleet.following.standing


def test_a_large_job_gets_in_although_small_ones_never_stop_coming() -> None:
    fleet = Fleet(LIMITS, devices=1)
    fleet.submit(make_job("large", parameters=95, reason=Reason.TURN, tenant="l"), 5.0)
    for second in range(200):
        fleet.submit(
            make_job(f"{second}", parameters=20, reason=Reason.TURN, tenant=f"t{second}", created_at=fleet.now), 9.0
        )
        fleet.tick(lambda: check(fleet))
        if fleet.snapshot.jobs[JobId("ftjob-large")].state is JobState.SUCCEEDED:
            break
    opening, drained = LIMITS.opening_s, 9.0 + 2
    assert second <= opening + LIMITS.overtake_s + drained + 5.0 + 5


def test_a_tenants_second_job_gets_in_although_new_tenants_never_stop_coming() -> None:
    fleet = Fleet(replace(LIMITS, max_jobs=2), devices=1)
    fleet.submit(make_job("long", tenant="x", reason=Reason.TURN, parameters=1), 1000.0)
    fleet.submit(make_job("second", tenant="x", reason=Reason.TURN, parameters=1), 1.0)
    for second in range(200):
        fleet.submit(
            make_job(f"{second}", parameters=1, reason=Reason.TURN, tenant=f"t{second}", created_at=fleet.now), 4.0
        )
        fleet.tick()
        if fleet.snapshot.jobs[JobId("ftjob-second")].final:
            break
    assert second <= LIMITS.opening_s + LIMITS.patience_s + 4.0 + 5


def test_sixty_jobs_train_in_two_packs_and_the_rest_of_them_is_drawn_into_one() -> None:
    limits = Limits(max_jobs=32, pack_bytes=1 << 40, opening_s=3.0, idle_s=60.0)
    fleet = Fleet(limits, devices=2)
    for n in range(60):
        fleet.submit(make_job(f"{n:02}", reason=Reason.TURN, created_at=float(n) / 100), 20.0 if n % 2 else 200.0)
    for _ in range(60):
        fleet.tick(lambda: check(fleet))
    moved = [one.event for one in fleet.log if isinstance(one.event, JobMoving)]
    assert sum(isinstance(one.event, PackOpening) for one in fleet.log) == 2
    assert 0 < len(moved) <= 16 and len({event.job for event in moved}) == len(moved)
    open_ones = [pack for pack in fleet.snapshot.packs.values() if pack.state is PackState.OPEN]
    assert len(open_ones) == 1
    assert sum(job.pack == open_ones[0].id for job in fleet.snapshot.jobs.values() if job.active) == 30
    assert max(Counter(one.event.job for one in fleet.log if isinstance(one.event, JobHeld)).values()) <= 3


@pytest.mark.parametrize("waiting", [10, 1000])
def test_a_job_that_is_told_nothing_new_costs_no_event(waiting: int) -> None:
    fleet = Fleet(replace(LIMITS, opening_s=1.0), devices=1)
    for n in range(waiting):
        fleet.submit(make_job(f"{n}", tenant=f"t{n % 7}", parameters=1, reason=Reason.TURN, created_at=n / 1e4), 1e6)
    for _ in range(5):
        fleet.tick()
    written = len(fleet.log)
    for _ in range(5):
        fleet.tick()
    assert len(fleet.log) == written
