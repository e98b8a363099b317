"""A fleet that is played over the real policy and the real events: packs, their workers and the time they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce

from polygraft.cluster import evolve
from polygraft.cluster.actors.following import Following
from polygraft.cluster.decisions import Admit, CancelJob, ClosePack, Decision, Hold, Move, OpenPack, Refuse
from polygraft.cluster.events import (
    BackboneAdded,
    DeviceJoined,
    Event,
    JobAdmitted,
    JobCancelled,
    JobFailed,
    JobHeld,
    JobLeft,
    JobMoving,
    JobRequeued,
    JobStarted,
    JobStopping,
    JobSubmitted,
    JobSucceeded,
    PackClosed,
    PackClosing,
    PackFailed,
    PackOpened,
    PackOpening,
)
from polygraft.cluster.model import EventId, GraftId, Job, JobError, JobId, Limits, Pace, PackId, Snapshot
from polygraft.cluster.policy.cycle import decide
from polygraft.cluster.states import JobState, PackState, Reason
from polygraft.cluster.store.base import StoredEvent
from tests.cluster.builders import make_backbone, make_device

TICK_S = 1.0


@dataclass
class Fleet:
    """`work_s` is how long a job has to train, `paced` whether packs tell what is left of it."""

    limits: Limits
    devices: int
    paced: bool = True
    now: float = 0.0
    work_s: dict[JobId, float] = field(default_factory=dict)
    log: list[StoredEvent] = field(default_factory=list)
    following: Following = field(default_factory=lambda: Following(Snapshot()))

    def __post_init__(self) -> None:
        for backbone in "bc":
            self.write(BackboneAdded(record=make_backbone(backbone), at=self.now))
        for index in range(self.devices):
            self.write(DeviceJoined(record=make_device(f"d{index}", index=index), at=self.now))

    @property
    def snapshot(self) -> Snapshot:
        return self.following.snapshot

    def write(self, event: Event) -> None:
        """As the store does: what cannot be raises here, and nothing is written."""
        stored = StoredEvent(EventId(f"{len(self.log) + 1}-0"), self.now, event)
        evolve.apply(self.snapshot, stored.id, event)
        self.log.append(stored)
        self.following.apply(stored)

    def submit(self, job: Job, work_s: float) -> None:
        self.work_s[job.id] = work_s
        self.write(JobSubmitted(record=job, at=self.now))

    def tick(self, check: Callable[[], None] = lambda: None) -> None:
        """A second of everybody's work, then a round of the controller."""
        self.now += TICK_S
        for pack in list(self.snapshot.packs.values()):
            here = [job for job in self.snapshot.jobs.values() if job.pack == pack.id and job.active]
            if pack.state is PackState.OPENING and self.now - pack.opened_at >= self.limits.opening_s:
                self.write(PackOpened(pack=pack.id, at=self.now))
            elif pack.state is PackState.CLOSING and not here:
                self.write(PackClosed(pack=pack.id, at=self.now))
            elif pack.state in (PackState.OPEN, PackState.CLOSING):
                for job in here:
                    self._work(pack.id, job)
        check()
        for decision in decide(self._seen(), self.following.standing):
            self._carry_out(decision)
            check()

    def fail(self, pack: PackId) -> None:
        """The pack's process dies for good."""
        for job in list(self.snapshot.jobs.values()):
            if job.pack == pack and job.active:
                self.write(JobRequeued(job=job.id, reason=Reason.PACK_LOST, blamed=False, at=self.now))
        self.write(PackFailed(pack=pack, error="lost", at=self.now))

    def replayed(self) -> Snapshot:
        return reduce(lambda snapshot, one: evolve.apply(snapshot, one.id, one.event), self.log, Snapshot())

    def _work(self, pack: PackId, job: Job) -> None:
        if job.state is JobState.QUEUED:
            self.write(JobStarted(job=job.id, pack=pack, parameters=job.parameters or 0, steps_total=9, at=self.now))
        elif job.stopping:
            self.write(JobCancelled(job=job.id, at=self.now))
        elif job.moving_to is not None:
            self.write(JobLeft(job=job.id, pack=pack, step=1, at=self.now))
        else:
            self.work_s[job.id] -= TICK_S
            if self.work_s[job.id] <= 0:
                self.write(_succeeded(job.id, self.now))

    def _seen(self) -> Snapshot:
        seen = replace(self.snapshot, now=self.now, limits=self.limits)
        if not self.paced:
            return seen
        left = {
            pack: {j.id: self.work_s[j.id] for j in seen.jobs.values() if j.pack == pack and j.active}
            for pack in seen.packs
        }
        return replace(seen, paces={pack: Pace(id=pack, at=self.now, left_s=one) for pack, one in left.items()})

    def _carry_out(self, decision: Decision) -> None:
        at = self.now
        match decision:
            case Hold(job=job, reason=reason):
                self.write(JobHeld(job=job, reason=reason, at=at))
            case Admit(job=job, pack=pack):
                self.write(JobAdmitted(job=job, pack=pack, at=at))
            case Refuse(job=job, reason=reason):
                self.write(JobFailed(job=job, error=JobError(reason.value, ""), at=at))
            case CancelJob(job=job, pack=None):
                self.write(JobCancelled(job=job, at=at))
            case CancelJob(job=job, pack=pack, reason=reason) if pack is not None:
                self.write(JobStopping(job=job, pack=pack, reason=reason, at=at))
            case Move(job=job, source=source, target=target, reason=reason):
                self.write(JobMoving(job=job, pack=source, to=target, reason=reason, at=at))
            case ClosePack(pack=pack, reason=reason):
                self.write(PackClosing(pack=pack, reason=reason, at=at))
            case OpenPack(pack=pack, backbone=backbone, devices=devices, bytes=bytes_, reason=reason):
                self.write(
                    PackOpening(
                        pack=pack, backbone=backbone, devices=devices, bytes=bytes_, epoch=1, reason=reason, at=at
                    )
                )


def _succeeded(job: JobId, at: float) -> JobSucceeded:
    return JobSucceeded(
        job=job,
        model=f"{job}@1",
        graft=GraftId("g"),
        step=9,
        trained_tokens=9,
        loss_before=None,
        loss_after=None,
        at=at,
    )
