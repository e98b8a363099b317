"""What happened: facts in the past tense, written to one log together with the record they change.

Every event carries the ids and the time (`at`, seconds since the epoch, the writer's clock) that `evolve` needs to
replay it.
"""

from __future__ import annotations

from dataclasses import dataclass

from polygraft.cluster.model import (
    Backbone,
    Device,
    DeviceId,
    Graft,
    GraftId,
    Job,
    JobError,
    JobId,
    PackId,
    Replica,
    ReplicaId,
    TenantId,
)
from polygraft.cluster.scores import UNJUDGED, Judged
from polygraft.cluster.size import Size
from polygraft.cluster.states import Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSubmitted:
    record: Job
    at: float

    @property
    def job(self) -> JobId:
        return self.record.id


@dataclass(frozen=True, slots=True, kw_only=True)
class JobHeld:
    """The job waits, for a reason it did not wait for before."""

    job: JobId
    reason: Reason
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobAdmitted:
    """The pack's command stream has the job's `admit`; it stays queued until the worker starts it."""

    job: JobId
    pack: PackId
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStarted:
    job: JobId
    pack: PackId
    parameters: int
    steps_total: int
    device_class: str | None = None  # where its steps are computed, as `Job` keeps it
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDeviceClassChanged:
    """The job goes on from a checkpoint whose steps a device of another class has computed: bit for bit it would have
    gone on within the class alone, and from here on it is equal to a tolerance."""

    job: JobId
    pack: PackId
    before: str
    after: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCancelRequested:
    job: JobId
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStopping:
    """The pack's command stream has the job's `cancel`."""

    job: JobId
    pack: PackId
    reason: Reason
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobMoving:
    """The pack's command stream has the job's `leave`; pack `to` keeps a place for it."""

    job: JobId
    pack: PackId
    to: PackId
    reason: Reason
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLeft:
    """The pack has let the job go after optimiser step `step`, whose checkpoint has all that decides its future."""

    job: JobId
    pack: PackId
    step: int
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLeaseRenewed:
    """The job's owner is alive and vouches for it until `until`."""

    job: JobId
    until: float
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequeued:
    """The job's pack ended without it. `blamed`: the pack failed, and the job is suspected of it."""

    job: JobId
    reason: Reason
    blamed: bool
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSucceeded:
    job: JobId
    model: str
    graft: GraftId
    step: int
    trained_tokens: int
    loss_before: float | None
    loss_after: float | None
    judged: Judged = UNJUDGED
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFailed:
    job: JobId
    error: JobError
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCancelled:
    job: JobId
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GraftPublished:
    graft: Graft
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasMoved:
    """The bare name now means this version."""

    tenant: TenantId
    name: str
    version: int
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GraftDeleted:
    tenant: TenantId
    name: str
    version: int
    graft: GraftId
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneAdded:
    """The backbone may be named from now on; one of that name before is now as the record says."""

    record: Backbone
    at: float

    @property
    def backbone(self) -> str:
        return self.record.name


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneAsked:
    """Somebody has asked it for an answer, or still gets one; said of one backbone every now and then."""

    backbone: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneSized:
    """It was added where no device was known: its packs and replicas are so large from now on."""

    backbone: str
    sizes: tuple[Size, ...]
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneLoading:
    """Replicas are to hold it."""

    backbone: str
    reason: Reason
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneUnloading:
    """No replica is to hold it any more; it was last asked at `asked_at`."""

    backbone: str
    asked_at: float
    reason: Reason
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneRemoved:
    backbone: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOpening:
    pack: PackId
    backbone: str
    devices: tuple[DeviceId, ...]
    bytes: int  # of each of them
    epoch: int
    reason: Reason
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOpened:
    pack: PackId
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlaced:
    """Ray gave the pack's processes other devices than they were meant for, and they hold these in their place."""

    pack: PackId
    devices: tuple[DeviceId, ...]
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PackClosing:
    pack: PackId
    reason: Reason
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PackClosed:
    pack: PackId
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PackFailed:
    pack: PackId
    error: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOpened:
    record: Replica
    at: float

    @property
    def replica(self) -> ReplicaId:
        return self.record.id


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaClosed:
    replica: ReplicaId
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceJoined:
    """The device is there; one that was there before is now as the record says."""

    record: Device
    at: float

    @property
    def device(self) -> DeviceId:
        return self.record.id


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLost:
    device: DeviceId
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerStarted:
    """A controller took the lease; whoever held it before is fenced out."""

    epoch: int
    at: float


JobEvent = (
    JobSubmitted
    | JobHeld
    | JobAdmitted
    | JobStarted
    | JobDeviceClassChanged
    | JobCancelRequested
    | JobStopping
    | JobMoving
    | JobLeft
    | JobLeaseRenewed
    | JobRequeued
    | JobSucceeded
    | JobFailed
    | JobCancelled
)
BackboneEvent = BackboneAdded | BackboneAsked | BackboneSized | BackboneLoading | BackboneUnloading | BackboneRemoved
PackEvent = PackOpening | PackPlaced | PackOpened | PackClosing | PackClosed | PackFailed
GraftEvent = GraftPublished | AliasMoved | GraftDeleted
FleetEvent = ReplicaOpened | ReplicaClosed | DeviceJoined | DeviceLost
Event = JobEvent | BackboneEvent | PackEvent | FleetEvent | GraftEvent | ControllerStarted
