"""What to do now: `decide` gives every job that waits a place or a reason. Pure: equal snapshots, equal decisions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

from polygraft.cluster.decisions import Admit, CancelJob, ClosePack, Decision, Hold, Move, OpenPack, Refuse
from polygraft.cluster.model import Job, JobId, Pack, PackId, Snapshot, TenantId
from polygraft.cluster.policy.admission import Turn, in_turn, stop_reason, turn
from polygraft.cluster.policy.budget import Budget
from polygraft.cluster.policy.consolidation import closings, joining
from polygraft.cluster.policy.devices import FreeDevices, is_leaving
from polygraft.cluster.policy.loading import loading
from polygraft.cluster.policy.packing import Rooms, kind_of_pack
from polygraft.cluster.policy.standing import Kind, Standing, kind_of
from polygraft.cluster.states import PackState, Reason


def decide(snapshot: Snapshot, standing: Standing | None = None) -> tuple[Decision, ...]:
    """One round: 1 cancel, 2 order, 3 admit or open packs, 4 join packs, 5 close idle ones and those on nodes that
    drain, 6 hold or refuse what is left, 7 load and unload backbones. A job is held again only for another reason.

    `standing` is that of the snapshot's jobs, for whoever keeps it up to date.
    """
    if standing is None:
        standing = Standing.of(snapshot.jobs.values())
    cancels = tuple(
        CancelJob(job.id, job.pack, reason)
        for job in sorted(standing.at_risk.values(), key=lambda job: job.id)
        if (reason := stop_reason(job, snapshot.now)) is not None
    )
    round_ = _Round(snapshot, standing, {cancel.job for cancel in cancels})
    packs: dict[Kind, list[Pack]] = defaultdict(list)
    closes: list[ClosePack] = []
    for pack in snapshot.packs.values():
        if snapshot.draining and pack.state is PackState.OPEN and is_leaving(pack, snapshot):
            closes.append(ClosePack(pack.id, Reason.NODE_DRAINS))
            packs[kind_of_pack(pack)].append(replace(pack, state=PackState.CLOSING))
        elif not pack.final:
            packs[kind_of_pack(pack)].append(pack)
    placed: list[Decision] = []
    moves: list[Move] = []
    stranded = [kind for kind in standing.queues if kind not in packs and round_.is_overdue(kind)]
    for kind in sorted(standing.queues, key=lambda kind: (kind not in stranded, round_.oldest(kind))):
        rooms = Rooms(kind, packs.get(kind, ()), snapshot, standing, round_.devices)
        rooms.shut(round_.draining)
        opened = len(round_.opened)
        placed += round_.place(kind, rooms)
        if kind in stranded and len(round_.opened) == opened and not rooms.backs_off:
            round_.make_room(kind)
    for kind in sorted(packs.keys() - standing.queues.keys()):
        alike = [pack for pack in packs[kind] if pack.state is PackState.OPEN and pack.id not in round_.draining]
        closes += closings(alike, standing, round_.last_end, snapshot)
        moves += joining(alike, standing, snapshot)
    yielded = sorted(pack for pack in round_.draining if not standing.count(pack))
    closes += (ClosePack(pack, Reason.YIELDED) for pack in yielded)
    return (*cancels, *round_.opened, *placed, *moves, *closes, *loading(snapshot, standing))


class _Round:
    """What the kinds of packs share during one round."""

    def __init__(self, snapshot: Snapshot, standing: Standing, stopped: Collection[JobId]) -> None:
        self.opened: list[OpenPack] = []
        self.devices = FreeDevices(snapshot)
        self._snapshot, self._standing, self._stopped = snapshot, standing, stopped
        self._placed: Counter[TenantId] = Counter()
        self._given = Counter(job.tenant for job in standing.arriving.values())
        self._at_limit: set[TenantId] = set()
        self.draining: set[PackId] = set()

    @cached_property
    def last_end(self) -> Mapping[PackId, float]:
        """When the last job of a pack ended, of those that are remembered; asked for where a pack may be idle."""
        ends: dict[PackId, float] = {}
        for job in self._standing.over.values():
            if job.pack is not None and job.finished_at is not None:
                ends[job.pack] = max(ends.get(job.pack, job.finished_at), job.finished_at)
        return ends

    def oldest(self, kind: Kind) -> Turn:
        """Of the jobs that wait for packs of the kind."""
        return min(turn(queue[0]) for queue in self._standing.queues[kind].values())

    def is_overdue(self, kind: Kind) -> bool:
        created_at = min(queue[0].created_at for queue in self._standing.queues[kind].values())
        return self._snapshot.now - created_at >= self._snapshot.limits.patience_s

    def make_room(self, kind: Kind) -> None:
        """For a kind without a pack, whose jobs waited for very long: what is free is kept for it, and of the packs
        that hold devices the emptiest take no more jobs, so that they end. New jobs of other kinds could keep them up
        for ever."""
        missing = max(1, kind.devices - self.devices.count(kind))
        self.devices.keep()
        held = (pack for pack in self._snapshot.packs.values() if pack.state is PackState.OPEN)
        for pack in sorted(held, key=lambda pack: (self._standing.count(pack.id), pack.id)):
            if missing > 0 and pack.id not in self.draining:
                self.draining.add(pack.id)
                missing -= len(pack.devices)

    def place(self, kind: Kind, rooms: Rooms) -> Iterator[Decision]:
        """What becomes of the jobs that wait for packs of one kind."""
        queues = self._standing.queues[kind]
        answered = set(self._stopped)
        for job in sorted(self._standing.arriving.values(), key=turn):
            if job.id not in answered and job.moving_to is not None and rooms.has(job.moving_to):
                answered.add(job.id)
                yield Admit(job.id, job.moving_to)
        limits = self._snapshot.limits
        entered, now = self._standing.entered, self._snapshot.now
        for job in in_turn(queues, entered, self._placed, self._at_limit, limits, now):
            if job.id in answered:
                continue
            answered.add(job.id)
            decision = self._placed_in(rooms, job)
            if not isinstance(decision, Hold) or decision.reason is not job.reason:
                yield decision
            if rooms.exhausted:
                break
        for job in sorted(self._standing.restless.values(), key=turn):
            if job.id not in answered and kind_of(job) == kind:
                yield Hold(job.id, Reason.TURN)

    def _placed_in(self, rooms: Rooms, job: Job) -> Decision:
        limits = self._snapshot.limits
        if job.spec.backbone not in self._snapshot.backbones:
            return Refuse(job.id, Reason.NO_BACKBONE)
        if job.attempts >= limits.max_attempts:
            return Refuse(job.id, Reason.PACKS_FAILED)
        if Budget(rooms.limits).refusal(job) is not None:
            return Refuse(job.id, Reason.TOO_LARGE)
        others = len(self._standing.active.get(job.tenant, ())) + self._given[job.tenant] - (job.moving_to is not None)
        if limits.tenant_jobs and others >= limits.tenant_jobs:
            self._at_limit.add(job.tenant)
            return Hold(job.id, Reason.TENANT_LIMIT)
        decision = rooms.place(job, self.opened)
        if isinstance(decision, Admit) or decision == Hold(job.id, Reason.PACK_OPENING):
            self._given[job.tenant] += 1
        return decision
