"""How events move jobs, packs and the snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from polygraft.cluster import evolve
from polygraft.cluster.events import (
    DeviceJoined,
    DeviceLost,
    Event,
    JobAdmitted,
    JobCancelled,
    JobCancelRequested,
    JobDeviceClassChanged,
    JobEvent,
    JobFailed,
    JobHeld,
    JobLeaseRenewed,
    JobLeft,
    JobMoving,
    JobRequeued,
    JobStarted,
    JobStopping,
    JobSubmitted,
    JobSucceeded,
    PackClosed,
    PackClosing,
    PackEvent,
    PackFailed,
    PackOpened,
    PackOpening,
    PackPlaced,
    ReplicaClosed,
    ReplicaOpened,
)
from polygraft.cluster.model import DeviceId, EventId, GraftId, Job, JobError, JobId, PackId, ReplicaId, Snapshot
from polygraft.cluster.states import IllegalTransition, JobState, PackState, Reason
from tests.cluster.builders import DEVICE_BYTES, make_device, make_job, make_pack, make_replica, make_snapshot, running

A, P, Q = JobId("ftjob-a"), PackId("pack-p"), PackId("pack-q")
ADMITTED = JobAdmitted(job=A, pack=P, at=2.0)
STARTED = JobStarted(job=A, pack=P, parameters=7, steps_total=10, at=3.0)
SUCCEEDED = JobSucceeded(
    job=A, model="n@1", graft=GraftId("g"), step=10, trained_tokens=99, loss_before=2.0, loss_after=1.0, at=4.0
)
FAILED = JobFailed(job=A, error=JobError("code", "message"), at=4.0)
CANCELLED = JobCancelled(job=A, at=4.0)
REQUEUED = JobRequeued(job=A, reason=Reason.PACK_FAILED, blamed=True, at=4.0)
D = DeviceId("d")
MOVING = JobMoving(job=A, pack=P, to=PackId("pack-q"), reason=Reason.JOINED, at=3.0)
OPENING = PackOpening(
    pack=P, backbone="b", devices=(D,), bytes=DEVICE_BYTES // 2, epoch=3, reason=Reason.JOBS_WAIT, at=1.0
)


def job_after_all(events: Sequence[JobEvent], job: Job) -> Job:
    for event in events:
        job = evolve.job_after(job, event)
    return job


def test_a_job_runs_and_succeeds() -> None:
    job = job_after_all([ADMITTED, STARTED, SUCCEEDED], make_job(reason=Reason.PACK_OPENING))
    assert job == make_job(
        state=JobState.SUCCEEDED,
        pack=P,
        admitted_at=2.0,
        started_at=3.0,
        finished_at=4.0,
        parameters=7,
        steps_total=10,
        step=10,
        trained_tokens=99,
        loss_before=2.0,
        loss_after=1.0,
        model="n@1",
        graft=GraftId("g"),
    )


def test_a_job_whose_pack_failed_waits_again_and_keeps_its_first_start() -> None:
    again = [ADMITTED, replace(STARTED, at=9.0)]
    job = evolve.job_after(running("a"), REQUEUED)
    assert job.waiting and (job.attempts, job.reason, job.started_at) == (1, Reason.PACK_FAILED, 2.0)
    assert job_after_all(again, job) == replace(running("a", parameters=7), attempts=1, admitted_at=2.0)  # type: ignore[arg-type]


def test_a_job_of_a_lost_pack_is_not_blamed() -> None:
    assert evolve.job_after(running("a"), replace(REQUEUED, blamed=False)).attempts == 0


def test_a_job_that_is_being_stopped_says_why_to_the_end() -> None:
    stopping = evolve.job_after(running("a"), JobStopping(job=A, pack=P, reason=Reason.OWNER_LOST, at=3.0))
    assert stopping.stopping and stopping.reason is Reason.OWNER_LOST
    cancelled = evolve.job_after(stopping, CANCELLED)
    assert (cancelled.state, cancelled.reason, cancelled.stopping) == (JobState.CANCELLED, Reason.OWNER_LOST, False)


def test_a_job_names_the_class_of_the_device_that_computes_it_now() -> None:
    first = evolve.job_after(running("a"), replace(STARTED, device_class="one"))
    moved = JobDeviceClassChanged(job=A, pack=P, before="one", after="other", at=4.0)
    again = job_after_all([replace(STARTED, device_class="other"), moved], first)
    assert (first.device_class, again.device_class) == ("one", "other")


def test_a_job_moves_from_one_pack_to_another() -> None:
    moving = JobMoving(job=A, pack=P, to=Q, reason=Reason.JOINED, at=3.0)
    left = job_after_all([moving, JobLeft(job=A, pack=P, step=4, at=4.0)], running("a"))
    assert left.waiting and (left.moving_to, left.reason) == (Q, Reason.MOVING)
    there = job_after_all([JobAdmitted(job=A, pack=Q, at=5.0), replace(STARTED, pack=Q, at=6.0)], left)
    assert there == running("a", "q", parameters=7, admitted_at=5.0)


def test_a_job_that_does_not_fit_knows_since_when_until_it_is_admitted() -> None:
    held = [JobHeld(job=A, reason=Reason.PACK_OPENING, at=2.0), JobHeld(job=A, reason=Reason.PACK_FULL, at=3.0)]
    blocked = job_after_all([*held, JobHeld(job=A, reason=Reason.PACK_MEMORY, at=4.0)], make_job())
    assert blocked.blocked_at == 3.0
    assert evolve.job_after(blocked, ADMITTED).blocked_at is None


def test_a_pack_that_fails_under_a_job_that_was_to_leave_gives_it_back_to_the_queue() -> None:
    moving = evolve.job_after(running("a"), JobMoving(job=A, pack=P, to=Q, reason=Reason.JOINED, at=3.0))
    back = evolve.job_after(moving, REQUEUED)
    assert back.waiting and back.moving_to is None


def test_a_restarted_worker_takes_a_running_job_up() -> None:
    assert evolve.job_after(running("a"), STARTED) == running("a", parameters=7)


@pytest.mark.parametrize(
    ("job", "event"),
    [
        (make_job(), STARTED),  # not admitted
        (make_job(), REQUEUED),
        (make_job(), SUCCEEDED),
        (make_job(pack=P), ADMITTED),
        (make_job(cancel_requested=True), ADMITTED),
        (make_job(pack=PackId("pack-q")), STARTED),  # admitted elsewhere
        (running("a"), JobHeld(job=A, reason=Reason.PACK_FULL, at=1.0)),
        (running("a", "q"), JobStopping(job=A, pack=P, reason=Reason.REQUESTED, at=1.0)),
        (running("a", "q"), MOVING),  # in another pack
        (running("a", stopping=True), MOVING),
        (running("a", moving_to=PackId("pack-r")), MOVING),
        (make_job(pack=P), MOVING),  # its worker has not started it
        (running("a"), JobLeft(job=A, pack=P, step=1, at=1.0)),  # nobody asked it to
    ],
)
def test_what_cannot_have_happened_is_refused(job: object, event: JobEvent) -> None:
    with pytest.raises(IllegalTransition):
        evolve.job_after(job, event)  # type: ignore[arg-type]


@pytest.mark.parametrize("end", [SUCCEEDED, FAILED, CANCELLED])
@pytest.mark.parametrize(
    "late",
    [
        STARTED,
        SUCCEEDED,
        FAILED,
        CANCELLED,
        REQUEUED,
        JobCancelRequested(job=A, at=5.0),
        JobLeaseRenewed(job=A, until=9.0, at=5.0),
    ],
)
def test_nothing_follows_the_end_of_a_job(end: JobEvent, late: JobEvent) -> None:
    ended = evolve.job_after(running("a"), end)
    with pytest.raises(IllegalTransition):
        evolve.job_after(ended, late)


def test_a_pack_opens_and_closes() -> None:
    events: list[PackEvent] = [
        PackOpened(pack=P, at=2.0),
        PackClosing(pack=P, reason=Reason.IDLE, at=3.0),
        PackClosed(pack=P, at=4.0),
    ]
    states = [PackState.OPEN, PackState.CLOSING, PackState.CLOSED]
    pack = evolve.opening(OPENING)
    for event, state in zip(events, states, strict=True):
        pack = evolve.pack_after(pack, event)
        assert pack.state is state
    assert pack == make_pack(state=PackState.CLOSED, epoch=3, closed_at=4.0)
    with pytest.raises(IllegalTransition):
        evolve.pack_after(pack, PackOpened(pack=P, at=5.0))


def test_a_worker_that_restarts_in_a_closing_pack_does_not_reopen_it() -> None:
    pack = evolve.pack_after(make_pack(state=PackState.CLOSING), PackOpened(pack=P, at=2.0))
    assert pack.state is PackState.CLOSING


def test_a_pack_is_where_ray_placed_it_until_it_is_over() -> None:
    placed = PackPlaced(pack=P, devices=(DeviceId("e"),), at=2.0)
    assert evolve.pack_after(make_pack(), placed) == make_pack(devices=(DeviceId("e"),))
    with pytest.raises(IllegalTransition):
        evolve.pack_after(make_pack(state=PackState.CLOSED), placed)


def test_the_snapshot_follows_the_log() -> None:
    events: list[Event] = [
        DeviceJoined(record=make_device(), at=0.0),
        JobSubmitted(record=make_job(), at=1.0),
        OPENING,
        ReplicaOpened(record=make_replica(), at=1.0),
        PackOpened(pack=P, at=2.0),
        ADMITTED,
        STARTED,
    ]
    snapshot = Snapshot()
    for n, event in enumerate(events):
        snapshot = evolve.apply(snapshot, EventId(f"{n + 1}-0"), event)
    assert (snapshot.version, snapshot.now) == ("7-0", 3.0)
    assert snapshot.jobs == {A: running("a", parameters=7, admitted_at=2.0, started_at=3.0)}
    assert snapshot.packs == {P: make_pack(epoch=3)}
    assert snapshot.devices == {D: make_device()} and snapshot.replicas == {ReplicaId("r"): make_replica()}
    assert snapshot.free_bytes(D) == DEVICE_BYTES // 4
    snapshot = evolve.apply(snapshot, EventId("8-0"), PackFailed(pack=P, error="out of memory", at=9.0))
    assert snapshot.free_bytes(D) == 3 * DEVICE_BYTES // 4
    snapshot = evolve.apply(snapshot, EventId("9-0"), ReplicaClosed(replica=ReplicaId("r"), at=9.0))
    assert snapshot.free_bytes(D) == DEVICE_BYTES
    snapshot = evolve.apply(snapshot, EventId("10-0"), DeviceJoined(record=make_device(bytes_=7), at=9.0))
    assert snapshot.free_bytes(D) == 7
    snapshot = evolve.apply(snapshot, EventId("11-0"), DeviceLost(device=D, at=9.0))
    assert not snapshot.replicas and not snapshot.devices


def test_applying_an_event_leaves_the_old_snapshot_as_it_was() -> None:
    old = make_snapshot(jobs=(make_job(),), packs=(make_pack(),))
    evolve.apply(old, EventId("17-0"), ADMITTED)
    assert old == make_snapshot(jobs=(make_job(),), packs=(make_pack(),))


def test_what_a_snapshot_has_forgotten_changes_only_its_version() -> None:
    empty = Snapshot()
    for event in (STARTED, PackOpened(pack=P, at=3.0)):
        assert evolve.apply(empty, EventId("1-0"), event) == Snapshot(version=EventId("1-0"), now=3.0)


def test_only_the_last_finished_jobs_are_remembered() -> None:
    past = [make_job(f"{n:03}", state=JobState.FAILED, finished_at=float(n)) for n in range(evolve.RECENT_JOBS)]
    snapshot = make_snapshot(jobs=(*past, running("a")))
    after = evolve.apply(snapshot, EventId("17-0"), FAILED)
    assert (
        past[0].finished_at is not None and FAILED.at > past[0].finished_at
    )  # so that the oldest of the past is forgotten
    assert after.jobs.keys() == {A, *(job.id for job in past[1:])}
    assert len(after.jobs) == evolve.RECENT_JOBS
