"""The life of a job, pack or graft, told from the event log: what happened, when, and why."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import assert_never

from polygraft.cluster.events import (
    AliasMoved,
    BackboneAdded,
    BackboneAsked,
    BackboneLoading,
    BackboneRemoved,
    BackboneSized,
    BackboneUnloading,
    ControllerStarted,
    DeviceJoined,
    DeviceLost,
    Event,
    GraftDeleted,
    GraftPublished,
    JobAdmitted,
    JobCancelled,
    JobCancelRequested,
    JobDeviceClassChanged,
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
    PackFailed,
    PackOpened,
    PackOpening,
    PackPlaced,
    ReplicaClosed,
    ReplicaOpened,
)
from polygraft.cluster.model import START, DeviceId, EventId
from polygraft.cluster.scores import Judged
from polygraft.cluster.size import Size
from polygraft.cluster.states import Reason
from polygraft.cluster.store.base import Store, StoredEvent

_PAGE = 1000


def story(store: Store, subject: str) -> list[str]:
    """Lines about `subject`: the id of a job, pack, replica or device, a backbone's name, a graft's id, "name@n", or
    an alias' name.

    The log is trimmed behind the snapshots, so an old story may have lost its beginning; unknown ids have no lines.
    """
    events = (stored.event for stored in _log(store) if subject in names(stored.event))
    return [f"{_clock(event.at)}  {tell(event)}" for event in events]


def names(event: Event) -> frozenset[str]:
    """Everything an event is about."""
    match event:
        case JobSubmitted(record=job):
            return frozenset({job.id, job.tenant})
        case GraftPublished(graft=graft):
            return frozenset({graft.id, graft.model, graft.name, graft.job or graft.id})
        case JobSucceeded(job=job_id, model=model, graft=graft_id):
            return frozenset({job_id, model, graft_id})
        case AliasMoved(name=name, version=version):
            return frozenset({name, f"{name}@{version}"})
        case GraftDeleted(name=name, version=version, graft=graft_id):
            return frozenset({name, f"{name}@{version}", graft_id})
        case JobMoving(job=job_id, pack=pack, to=to):
            return frozenset({job_id, pack, to})
        case PackOpening(pack=pack, devices=devices) | PackPlaced(pack=pack, devices=devices):
            return frozenset({pack, *devices})
        case ReplicaOpened(record=replica):
            return frozenset({replica.id, *replica.devices})
        case DeviceJoined(record=device):
            return frozenset({device.id})
        case BackboneAdded(record=backbone):
            return frozenset({backbone.name})
        case _:
            named = {field.name for field in fields(event)} & {"job", "pack", "replica", "device", "backbone"}
            return frozenset(str(getattr(event, name)) for name in named)


def tell(event: Event) -> str:
    """The event as a sentence."""
    match event:
        case JobSubmitted(record=job):
            return f"{job.id} submitted by {job.tenant}: {job.spec.peft} on {job.spec.backbone}"
        case JobHeld(job=job_id, reason=reason):
            return f"{job_id} waits: {_words(reason)}"
        case JobAdmitted(job=job_id, pack=pack):
            return f"{job_id} admitted to {pack}"
        case JobStarted(job=job_id, pack=pack, parameters=parameters, steps_total=steps):
            return f"{job_id} started in {pack}: {parameters:,} parameters, {steps} steps"
        case JobDeviceClassChanged(job=job_id, pack=pack, before=before_class, after=after_class):
            return f"{job_id} goes on in {pack} on {after_class}; its steps so far are of {before_class}"
        case JobCancelRequested(job=job_id):
            return f"{job_id} is asked to cancel"
        case JobStopping(job=job_id, pack=pack, reason=reason):
            return f"{job_id} is being stopped in {pack}: {_words(reason)}"
        case JobMoving(job=job_id, pack=pack, to=to, reason=reason):
            return f"{job_id} is to move from {pack} to {to}: {_words(reason)}"
        case JobLeft(job=job_id, pack=pack, step=step):
            return f"{job_id} left {pack} after step {step}"
        case JobLeaseRenewed(job=job_id, until=until):
            return f"{job_id} is wanted by its owner until {_clock(until)}"
        case JobRequeued(job=job_id, reason=reason, blamed=blamed):
            return f"{job_id} went back to the queue: {_words(reason)}" + (", counted against it" if blamed else "")
        case JobSucceeded(job=job_id, model=model, step=step, loss_before=before, loss_after=after, judged=judged):
            losses = "" if before is None or after is None else f", held-out loss {before:.3f} -> {after:.3f}"
            return f"{job_id} succeeded after {step} steps as {model}{losses}{_scores(judged)}"
        case JobFailed(job=job_id, error=error):
            return f"{job_id} failed: {error.message} ({error.code})"
        case JobCancelled(job=job_id):
            return f"{job_id} cancelled"
        case GraftPublished(graft=graft):
            return f"{graft.model} published: {graft.method}, {graft.parameters:,} parameters, graft {graft.id}"
        case AliasMoved(name=name, version=version):
            return f"{name} now means {name}@{version}"
        case GraftDeleted(name=name, version=version, graft=graft_id):
            return f"{name}@{version} deleted: graft {graft_id}"
        case BackboneAdded(record=added):
            how = f"{added.dtype}, {added.quantise}" if added.quantise else added.dtype
            added_as = f"{added.folder}, {how}, fingerprint {added.fingerprint[:12]}"
            return f"backbone {added.name} added: {added_as}{_sizes(added.sizes)}"
        case BackboneAsked(backbone=backbone):
            return f"backbone {backbone} is asked"
        case BackboneSized(backbone=backbone, sizes=sizes):
            return f"backbone {backbone} has its sizes{_sizes(sizes)}"
        case BackboneLoading(backbone=backbone, reason=reason):
            return f"backbone {backbone} is to be loaded: {_words(reason)}"
        case BackboneUnloading(backbone=backbone, reason=reason):
            return f"backbone {backbone} is to be unloaded: {_words(reason)}"
        case BackboneRemoved(backbone=backbone):
            return f"backbone {backbone} removed"
        case PackOpening(pack=pack, backbone=backbone, devices=devices, bytes=bytes_, reason=reason):
            return f"{pack} opens with {backbone} on {_place(devices, bytes_)}: {_words(reason)}"
        case PackPlaced(pack=pack, devices=devices):
            return f"{pack} is on {', '.join(devices)} by Ray's choice"
        case PackOpened(pack=pack):
            return f"{pack} is open"
        case PackClosing(pack=pack, reason=reason):
            return f"{pack} is closing: {_words(reason)}"
        case PackClosed(pack=pack):
            return f"{pack} closed"
        case PackFailed(pack=pack, error=text):
            return f"{pack} failed: {text}"
        case ReplicaOpened(record=replica):
            return f"{replica.id} serves {replica.backbone} on {_place(replica.devices, replica.bytes)}"
        case ReplicaClosed(replica=closed):
            return f"{closed} closed"
        case DeviceJoined(record=device):
            speed = f", {device.speed / 1e9:,.0f} GFLOP/s" if device.speed else ""
            return f"device {device.id} joined: {device.cores} cores, {_gib(device.bytes)}{speed}"
        case DeviceLost(device=lost):
            return f"device {lost} is gone"
        case ControllerStarted(epoch=epoch):
            return f"controller of epoch {epoch} took over"
        case _:
            assert_never(event)


def _log(store: Store) -> Iterator[StoredEvent]:
    position: EventId = START
    while page := store.events(position, limit=_PAGE):
        yield from page
        position = page[-1].id


def _sizes(sizes: Sequence[Size]) -> str:
    """What follows from the devices, and what was given instead."""
    told = [f"{one.name} {one.used:,}" + (f" ({one.derived:,})" * (one.used != one.derived)) for one in sizes]
    return f"; {', '.join(told)}" if told else ""


def _scores(judged: Judged) -> str:
    """What the examples said beside the losses."""
    before, after = judged.before.told, judged.after.told
    parts = [f"{name} {before[name]:.3f} -> {value:.3f}" for name, value in after.items() if name in before]
    if judged.test_loss is not None:
        parts += [f"test loss {judged.test_loss:.3f}"]
        parts += [f"test {name} {value:.3f}" for name, value in judged.test.told.items()]
    return "".join(f", {part}" for part in parts)


def _place(devices: Sequence[DeviceId], bytes_: int) -> str:
    where = f"device {devices[0]}" if len(devices) == 1 else f"devices {', '.join(devices)}"
    return f"{where}, {_gib(bytes_)}" + (" each" if len(devices) > 1 else "")


def _gib(bytes_: int) -> str:
    return f"{bytes_ / 2**30:.1f} GiB"


def _words(reason: Reason) -> str:
    return reason.replace("_", " ")


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
