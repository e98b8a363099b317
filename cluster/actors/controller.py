"""The controller's loop, without Ray: follow the log, write down what became of processes, decide, carry out."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from threading import Event
from typing import assert_never

from polygraft.cluster import evolve
from polygraft.cluster.actors.following import Following
from polygraft.cluster.actors.protocols import Effects
from polygraft.cluster.advance import advance_job, advance_pack, swap
from polygraft.cluster.backbones import advance_backbone, backbones
from polygraft.cluster.decisions import (
    AT_ONCE,
    Admit,
    CancelJob,
    ClosePack,
    Decision,
    Hold,
    LoadBackbone,
    Move,
    OpenPack,
    Refuse,
    UnloadBackbone,
)
from polygraft.cluster.events import (
    BackboneLoading,
    BackboneSized,
    BackboneUnloading,
    ControllerStarted,
    DeviceJoined,
    DeviceLost,
    JobAdmitted,
    JobCancelled,
    JobEvent,
    JobFailed,
    JobHeld,
    JobMoving,
    JobRequeued,
    JobStopping,
    PackClosed,
    PackClosing,
    PackEvent,
    PackFailed,
    PackOpening,
)
from polygraft.cluster.leasing import LeaseRefused, close_replica, end_pack, open_pack
from polygraft.cluster.model import (
    Device,
    EventId,
    JobError,
    JobId,
    Limits,
    Occupancy,
    Pace,
    PackId,
    Snapshot,
)
from polygraft.cluster.policy.cycle import decide
from polygraft.cluster.states import IllegalTransition, PackState, Reason
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Append, Conflict, Fence, Fenced, Lease, Store, StoreUnavailable, Write
from polygraft.cluster.store.lists import relist

LOG = logging.getLogger(__name__)
TTL_S = 15.0
MEASURED_S = 60.0  # a device whose speed is not known for so long is taken for a slow one
PACES_S = 3.0  # how long what packs measured of their jobs is used
STOP_S = 8.0  # for packs to put down their jobs when the service stops
LOOK_S = 0.1
POLL_S = 0.5  # how long a pack's end may go unnoticed
BACKOFF_S = (0.2, 0.5, 1.0, 2.0)
SNAPSHOT_EVENTS = 200
EVENTS_KEPT = 10_000  # at least so many the log keeps before the last snapshot, for `story`
REFUSALS = {
    Reason.TOO_LARGE: "the job's trainable parameters need more memory than a pack has; choose a smaller peft",
    Reason.NO_BACKBONE: "the job's backbone was removed from the service; add it again and submit the job anew",
    Reason.PACKS_FAILED: "packs failed too often while it was suspected of it; the service's log says why",
}


class Controller:
    """One term of leading after another. Every write carries the lease's epoch, so that a stalled leader cannot act."""

    def __init__(
        self,
        store: Store,
        effects: Effects,
        *,
        limits: Limits,
        holder: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._following = Following(Snapshot())
        self._paces: Mapping[PackId, Pace] = {}
        self._paced_at = float("-inf")
        self._store = store
        self._effects = effects
        self._limits = limits
        self._holder = holder
        self._clock = clock
        self._lease: Lease | None = None
        self._renewed_at = 0.0
        self._saved: deque[tuple[EventId, int]] = deque()  # of each snapshot, and how many events came after it
        self._unsaved = 0
        self._looked_at: tuple[tuple[Device, ...], float] = ((), 0.0)  # devices, and since when they are these
        self._unfit: set[str] = set()  # backbones that fit none of them

    def run(self, stop: Event, beat: Callable[[], None] = lambda: None, *, steal: bool = True) -> None:
        """Lead until `stop` is set; `beat` is called once a round. Survives the loss of the store and of the lease.

        With `steal` it begins by taking the lease from whoever leads, as the newest controller of a machine is the one
        that was meant to run; without, it waits until that one is gone.
        """
        failures = 0
        while not stop.is_set():
            beat()
            try:
                if self._lease is None and not self._take_over(steal=steal):
                    self._serve()  # its own cluster's replicas, whoever leads
                    stop.wait(POLL_S)
                    continue
                steal = False
                self.round()
                self._store.events(self.snapshot.version, limit=1, wait_s=POLL_S)
                failures = 0
            except StoreUnavailable as error:
                LOG.warning("store unavailable: %s", error)
                stop.wait(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
                failures += 1
            except Fenced as error:
                LOG.warning("lost the lease: %s", error)
                self._stand_down(error)
        if self._lease is not None:
            with suppress(StoreUnavailable, Fenced):  # it runs out by itself
                self._put_down()
                self._store.release(self._lease)

    def _put_down(self) -> None:
        """Let the packs that train end after their last step, as far as that takes no longer than STOP_S: what is not
        on disk by then goes on from its last checkpoint."""
        self._catch_up()
        training = [pack for pack in self.snapshot.packs.values() if pack.state is PackState.OPEN]
        training = [pack for pack in training if self._following.standing.count(pack.id)]
        for pack in training:
            with suppress(IllegalTransition, Conflict):
                self._carry_out(ClosePack(pack.id, Reason.STOPPING))
        waiting, until = {pack.id for pack in training}, time.monotonic() + STOP_S
        while waiting and time.monotonic() < until:
            time.sleep(LOOK_S)
            for end in self._effects.ended():
                waiting.discard(end.pack)
                self._end_pack(end.pack, end.error, Reason.STOPPING, end.suspects)

    @property
    def snapshot(self) -> Snapshot:
        return self._following.snapshot

    def round(self) -> None:
        """One round under the lease: first only learn what happened, then act on it."""
        self._renew()
        self._catch_up()
        self._learn()
        self._catch_up()
        self._size()
        self._read_paces()
        draining = tuple(self._effects.draining())
        now = replace(self.snapshot, now=self._clock(), limits=self._limits, paces=self._paces, draining=draining)
        for decision in decide(now, self._following.standing):
            try:
                self._carry_out(decision)
            except (IllegalTransition, Conflict, LeaseRefused) as error:  # the next round sees what moved since
                LOG.info("not any more: %s: %s", decision, error)
        self._serve()

    def _stand_down(self, error: Fenced) -> None:
        """Somebody else leads. It may have this one's name, where Ray took this one for dead: under the same name it
        would take the lease back. Its packs hold devices that the other one gives out."""
        self._lease = None
        self._holder = f"{self._holder}, until epoch {error.current}"
        for pack in tuple(self._effects.alive()):
            self._effects.close_pack(pack)

    def _serve(self) -> None:
        """Bring this cluster's replicas to what the store says."""
        self._effects.serve([backbone for backbone in backbones(self._store) if backbone.loaded])

    def _take_over(self, *, steal: bool) -> bool:
        """Become the leader: state from the last snapshot and the log's tail. False while another one leads."""
        lease = self._store.acquire(keys.CONTROLLER, self._holder, TTL_S, steal=steal)
        if lease is None:
            return False
        self._renewed_at = time.monotonic()
        relist(self._store)
        started = ControllerStarted(epoch=lease.epoch, at=self._clock())
        self._store.commit([], [started], fence=lease.fence)
        saved = self._store.get(keys.SNAPSHOT)
        self._following = Following(saved.value if saved else Snapshot())
        self._lease = lease  # not before the snapshot is read: without it the log's tail would be taken for the whole
        self._catch_up()
        LOG.info("leading: epoch=%d version=%s", lease.epoch, self.snapshot.version)
        return True

    @property
    def _fence(self) -> Fence:
        assert self._lease is not None
        return self._lease.fence

    def _renew(self) -> None:
        assert self._lease is not None
        if time.monotonic() - self._renewed_at > TTL_S / 3:
            if not self._store.renew(self._lease):
                raise Fenced(self._lease.scope, self._lease.epoch, self._lease.epoch + 1)
            self._renewed_at = time.monotonic()

    def _catch_up(self) -> None:
        while batch := self._store.events(self.snapshot.version):
            for stored in batch:
                self._following.apply(stored)
            self._unsaved += len(batch)
        # A snapshot is as large as the fleet: one after as many events costs each of them the same.
        if self._unsaved >= max(SNAPSHOT_EVENTS, self._following.unfinished):
            self._save()

    def _save(self) -> None:
        self._store.commit([Write(keys.SNAPSHOT, self.snapshot, None)], fence=self._fence)
        self._saved = deque((version, later + self._unsaved) for version, later in self._saved)
        self._saved.append((self.snapshot.version, 0))
        self._unsaved = 0
        while len(self._saved) > 1 and self._saved[1][1] >= EVENTS_KEPT:
            self._saved.popleft()
        if self._saved[0][1] >= EVENTS_KEPT:
            self._store.trim(self._saved[0][0])

    def _read_paces(self) -> None:
        """What packs measured of their jobs, now and then, where somebody waits or packs could be joined."""
        needed = self._following.standing.queues or len(self._following.standing.loads) > 1
        if needed and time.monotonic() - self._paced_at > PACES_S:
            self._paced_at = time.monotonic()
            self._paces = {found.value.id: found.value for found in self._store.scan(keys.PACES)}

    def _learn(self) -> None:
        """Write down what the world says: devices that came and went, packs whose process is over."""
        devices, now = {device.id: device for device in self._effects.devices()}, self._clock()
        for id_, device in sorted(devices.items()):
            if self.snapshot.devices.get(id_) != device:
                self._join(device, now)
        for id_ in sorted(self.snapshot.devices.keys() - devices.keys()):
            gone = Write(keys.device(id_), None, None)
            self._store.commit([gone], [DeviceLost(device=id_, at=now)], fence=self._fence)
        for replica in self._effects.gone(tuple(self.snapshot.replicas.values())):
            self._store.acquire(keys.replica_scope(replica), self._holder, TTL_S, steal=True, fence=self._fence)
            close_replica(self._store, replica, at=now, fence=self._fence)
        over = [
            (end.pack, end.error, Reason.PACK_FAILED if end.error else Reason.PACK_CLOSED, end.suspects)
            for end in self._effects.ended()
        ]
        ended, alive = {pack for pack, *_ in over}, self._effects.alive()
        for pack in [one for one in self.snapshot.packs.values() if not one.final and one.id not in ended]:
            if pack.id not in alive:
                over.append((pack.id, "its process did not survive", Reason.PACK_LOST, ()))
            elif missing := sorted(set(pack.devices) - devices.keys()):
                over.append((pack.id, f"{', '.join(missing)} is gone", Reason.PACK_LOST, ()))
        for lost, error, reason, suspects in over:
            self._end_pack(lost, error, reason, suspects)

    def _size(self) -> None:
        """Give their sizes to backbones that were added where no device was known, once the speeds are, or will not
        be."""
        devices, now = tuple(self.snapshot.devices.values()), self._clock()
        if devices != self._looked_at[0]:
            self._looked_at = devices, now
            self._unfit.clear()
        if not devices or (now - self._looked_at[1] < MEASURED_S and not all(device.speed for device in devices)):
            return
        for backbone in [one for one in self.snapshot.backbones.values() if not one.sizes]:
            if backbone.name in self._unfit:
                continue
            try:
                sizes = self._effects.sizes(backbone, devices)
            except (ValueError, OSError) as error:  # it fits none of them, or its folder is gone
                LOG.warning("%s has no sizes: %s", backbone.name, error)
                self._unfit.add(backbone.name)
                continue
            if sizes:
                sized = BackboneSized(backbone=backbone.name, sizes=sizes, at=now)
                advance_backbone(self._store, sized, fence=self._fence)

    def _join(self, device: Device, now: float) -> None:
        """The device as it is now; who holds what of it stays."""

        def change(found: Occupancy | None) -> Occupancy:
            return Occupancy(device=device, holders=found.holders if found else ())

        joined = DeviceJoined(record=device, at=now)
        swap(self._store, keys.device(device.id), change, events=(joined,), fence=self._fence)

    def _end_pack(self, pack: PackId, error: str | None, reason: Reason, suspects: Collection[JobId] = ()) -> None:
        """Shut the pack's worker out, requeue its jobs, then say that it is over and holds nothing: a crash halfway
        repeats it all. It counts against the suspects alone."""
        self._store.acquire(keys.pack_scope(pack), self._holder, TTL_S, steal=True, fence=self._fence)
        now = self._clock()
        events: list[JobEvent | PackEvent] = [
            JobRequeued(job=job.id, reason=reason, blamed=job.id in suspects, at=now)
            for job in sorted(self.snapshot.jobs.values(), key=lambda job: job.id)
            if job.pack == pack and job.active
        ]
        events.append(PackFailed(pack=pack, error=error, at=now) if error else PackClosed(pack=pack, at=now))
        for event in events:
            try:
                self._write(event)
            except IllegalTransition as illegal:  # it finished just before
                LOG.info("%s", illegal)
        self._store.commit([Write(keys.pace(pack), None, None)], fence=self._fence)
        self._effects.close_pack(pack)

    def _carry_out(self, decision: Decision) -> None:
        """Write the decision as an event, with the command to the pack's worker in one commit; then start processes."""
        now = self._clock()
        match decision:
            case Hold(job=job, reason=reason):
                self._write(JobHeld(job=job, reason=reason, at=now))
            case Admit(job=job, pack=pack):
                self._write(JobAdmitted(job=job, pack=pack, at=now), _command(pack, "admit", job))
            case Refuse(job=job, reason=reason):
                error = JobError(reason.value, REFUSALS[reason])
                self._write(JobFailed(job=job, error=error, at=now))
            case CancelJob(job=job, pack=None):
                self._write(JobCancelled(job=job, at=now))
            case CancelJob(job=job, pack=pack, reason=reason):
                assert pack is not None
                self._write(JobStopping(job=job, pack=pack, reason=reason, at=now), _command(pack, "cancel", job))
            case Move(job=job, source=source, target=target, reason=reason):
                moving = JobMoving(job=job, pack=source, to=target, reason=reason, at=now)
                self._write(moving, _command(source, "leave", job))
            case ClosePack(pack=pack, reason=reason):
                op = "stop" if reason in AT_ONCE else "close"
                self._write(PackClosing(pack=pack, reason=reason, at=now), _command(pack, op))
            case LoadBackbone(backbone=backbone, reason=reason):
                advance_backbone(
                    self._store, BackboneLoading(backbone=backbone, reason=reason, at=now), fence=self._fence
                )
            case UnloadBackbone(backbone=backbone, asked_at=asked_at, reason=reason):
                unloading = BackboneUnloading(backbone=backbone, asked_at=asked_at, reason=reason, at=now)
                advance_backbone(self._store, unloading, fence=self._fence)
            case OpenPack(pack=pack, backbone=backbone, devices=held, bytes=bytes_, reason=reason):
                opening = PackOpening(
                    pack=pack,
                    backbone=backbone,
                    devices=held,
                    bytes=bytes_,
                    epoch=self._fence.epoch,
                    reason=reason,
                    at=now,
                )
                self._write(opening)
                try:
                    self._effects.open_pack(evolve.opening(opening))
                except Exception as failure:  # whatever a process's start may raise, it is the pack's failure
                    LOG.exception("%s cannot be opened", pack)
                    self._end_pack(pack, f"{type(failure).__name__}: {failure}", Reason.PACK_FAILED)
            case _:
                assert_never(decision)
        if not isinstance(decision, Hold):
            LOG.info("%s", decision)

    def _write(self, event: JobEvent | PackEvent, *commands: Append) -> None:
        """The event, the record it changes, what a pack takes and gives back of its devices, and the commands, all or
        nothing. Raises IllegalTransition, LeaseRefused."""
        if isinstance(event, PackOpening):
            open_pack(self._store, event, fence=self._fence)
        elif isinstance(event, PackClosed | PackFailed):
            end_pack(self._store, event, fence=self._fence)
        elif isinstance(event, PackEvent):
            advance_pack(self._store, event, fence=self._fence, appends=commands)
        else:
            advance_job(self._store, event, fence=self._fence, appends=commands)


def _command(pack: PackId, op: str, job: JobId | None = None) -> Append:
    return Append(keys.commands(pack), {"op": op} if job is None else {"op": op, "job": job})
