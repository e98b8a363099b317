"""What is to be done, in the imperative, each with its typed reason; refusing and waiting are decisions too."""

from __future__ import annotations

from dataclasses import dataclass

from polygraft.cluster.model import DeviceId, JobId, PackId
from polygraft.cluster.states import Reason

AT_ONCE = frozenset({Reason.NODE_DRAINS, Reason.STOPPING})  # of a pack's end: it does not wait for its jobs


@dataclass(frozen=True, slots=True)
class Admit:
    """Send the job to an open pack."""

    job: JobId
    pack: PackId
    reason: Reason = Reason.FITS


@dataclass(frozen=True, slots=True)
class Hold:
    """Let the job wait."""

    job: JobId
    reason: Reason


@dataclass(frozen=True, slots=True)
class Refuse:
    """Fail the job: no pack can ever take it."""

    job: JobId
    reason: Reason


@dataclass(frozen=True, slots=True)
class Move:
    """Let a running job go on in another pack: it leaves `source` between two of its steps and is admitted to `target`,
    which keeps a place for it from now on."""

    job: JobId
    source: PackId
    target: PackId
    reason: Reason = Reason.JOINED


@dataclass(frozen=True, slots=True)
class OpenPack:
    """Start a pack of the backbone, which holds `bytes` of each of the devices; jobs follow once it is open."""

    pack: PackId
    backbone: str
    devices: tuple[DeviceId, ...]
    bytes: int
    reason: Reason = Reason.JOBS_WAIT


@dataclass(frozen=True, slots=True)
class ClosePack:
    """Let the pack end; it has no jobs, or they are put down after their last step where the reason is one of
    AT_ONCE."""

    pack: PackId
    reason: Reason


@dataclass(frozen=True, slots=True)
class LoadBackbone:
    """Let replicas hold the backbone."""

    backbone: str
    reason: Reason = Reason.ASKED


@dataclass(frozen=True, slots=True)
class UnloadBackbone:
    """Let no replica hold the backbone, if it was not asked again after `asked_at`."""

    backbone: str
    asked_at: float
    reason: Reason = Reason.IDLE


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Stop the job: at once while it waits (`pack` None), else by a command to its pack."""

    job: JobId
    pack: PackId | None
    reason: Reason


Decision = Admit | Hold | Refuse | Move | OpenPack | ClosePack | CancelJob | LoadBackbone | UnloadBackbone
