"""Which pack a job goes to, by Punica's rule (Chen et al. 2023, arXiv 2310.18547, section 5.1) for training: the
fullest that has room, so that light ones drain; when a new one is opened; and whom a job may not overtake."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable
from math import inf

from polygraft.cluster.decisions import Admit, Decision, Hold, OpenPack
from polygraft.cluster.model import Job, Pack, PackId, Snapshot
from polygraft.cluster.policy.budget import Budget, limits_of
from polygraft.cluster.policy.devices import FreeDevices
from polygraft.cluster.policy.room import Room, paces
from polygraft.cluster.policy.standing import Kind, Standing
from polygraft.cluster.states import PackState, Reason

BACKOFF_S = 1.0  # before a new pack after a failed one; doubles with every failure in a row
BACKOFF_MAX_S = 300.0
LOOK = 64  # jobs that do not fit, after which a round looks at no more of their kind


class Rooms:
    """The packs of one kind in a round: open ones, and those that are opening, which will be empty."""

    def __init__(
        self, kind: Kind, packs: Iterable[Pack], snapshot: Snapshot, standing: Standing, devices: FreeDevices
    ) -> None:
        self._kind, self._snapshot, self._standing, self._devices = kind, snapshot, standing, devices
        self.limits = limits_of(snapshot.limits, snapshot.backbones.get(kind.backbone))
        self.open: list[Room] = []
        self._full: list[Room | Pack] = []  # a room is made of such a pack when somebody asks when it has a place
        self._opening: list[Budget] = []
        self._closing = False
        for pack in packs:
            if pack.state is PackState.OPEN and standing.count(pack.id) >= self.limits.max_jobs:
                self._full.append(pack)
            elif pack.state is PackState.OPEN:
                self.open.append(self._room(pack))
            elif pack.state is PackState.OPENING:
                self._opening.append(self._room(pack).budget)
            else:
                self._closing = True
        self.open.sort(key=lambda room: room.order)
        self.backs_off = backing_off(snapshot, kind)
        self._blocked = 0

    @property
    def exhausted(self) -> bool:
        """Whether it is of no use to look at further jobs in this round."""
        if self._blocked == 0:
            return False
        if self._blocked >= LOOK:
            return True
        places = any(not room.kept for room in self.open) or any(empty.jobs > 0 for empty in self._opening)
        return not places and not self._may_open

    def shut(self, packs: Collection[PackId]) -> None:
        """No job goes into these packs."""
        self.open = [room for room in self.open if room.pack.id not in packs]
        self._full = [one for one in self._full if _pack_of(one).id not in packs]

    def has(self, pack: PackId) -> bool:
        """Whether it is open and takes jobs."""
        return any(room.pack.id == pack for room in self.open) or any(_pack_of(one).id == pack for one in self._full)

    def place(self, job: Job, opened: list[OpenPack]) -> Decision:
        """What becomes of a job that could be in an empty pack; one that is opened for it joins `opened`."""
        fullest = next((room for room in self.open if room.takes(job)), None)
        if fullest is not None:
            self.open.remove(fullest)
            fullest.take(job)
            if fullest.budget.jobs > 0:
                insort(self.open, fullest, key=lambda room: room.order)
            else:
                self._full.append(fullest)
            return Admit(job.id, fullest.pack.id)
        ready = next((empty for empty in self._opening if empty.refusal(job) is None), None)
        if ready is None and self._may_open and self._wait_s(job) > self.limits.opening_s:
            ready = self._new(opened)
        if ready is not None:
            ready.take(job)
            return Hold(job.id, Reason.PACK_OPENING)
        self._blocked += 1
        return Hold(job.id, self._keep_back(job))

    def _keep_back(self, job: Job) -> Reason:
        """Why the job waits. One that was overtaken long enough gets the pack that has room for it first to itself."""
        if not (self.open or self._full or self._opening):
            return self._why_none()
        overdue = job.blocked_at is not None and self._snapshot.now - job.blocked_at >= self.limits.overtake_s
        memory = self.open or any(empty.jobs > 0 for empty in self._opening)
        if (overdue or self._may_open) and (soonest := self._soonest(job)) is not None:  # it counts on what ends there
            soonest.promise(job)
            soonest.kept = overdue
        return Reason.PACK_MEMORY if memory else Reason.PACK_FULL

    def _soonest(self, job: Job) -> Room | None:
        """The pack in which the job would fit first; where no pace is known, the emptiest."""

        def rank(room: Room) -> tuple[float, int, int, PackId]:
            return room.wait_s(job), room.count, -room.budget.bytes, room.pack.id

        return min((room for room in self._everyone() if not room.kept), key=rank, default=None)

    def _everyone(self) -> list[Room]:
        """All open packs, those without a place, too."""
        full = [one if isinstance(one, Room) else self._room(one) for one in self._full]
        self._full = [*full]
        return [*self.open, *full]

    def _room(self, pack: Pack) -> Room:
        return Room(pack, self.limits, self._standing.load(pack.id), paces(self._snapshot, pack.id))

    @property
    def _may_open(self) -> bool:
        return not self.backs_off and self._devices.has(self._kind)

    def _why_none(self) -> Reason:
        if self.backs_off:
            return Reason.PACK_BACKOFF
        return Reason.PACK_CLOSING if self._closing else Reason.NO_DEVICE

    def _new(self, opened: list[OpenPack]) -> Budget:
        found = self._devices.take(self._kind)
        assert found is not None, "asked before"
        order = OpenPack(new_pack_id(self._snapshot, len(opened)), self._kind.backbone, found.devices, found.bytes)
        opened.append(order)
        empty = Budget(self.limits)
        self._opening.append(empty)
        return empty

    def _wait_s(self, job: Job) -> float:
        return min((room.wait_s(job) for room in self._everyone() if not room.kept), default=inf)


def _pack_of(one: Room | Pack) -> Pack:
    return one.pack if isinstance(one, Room) else one


def kind_of_pack(pack: Pack) -> Kind:
    return Kind(pack.backbone, len(pack.devices))


def backing_off(snapshot: Snapshot, kind: Kind) -> bool:
    """Whether the last packs of the kind failed so lately that a new one has to wait."""
    past = sorted(
        (pack for pack in snapshot.packs.values() if pack.final and kind_of_pack(pack) == kind),
        key=lambda pack: (pack.opened_at, pack.id),
        reverse=True,
    )
    failures = 0
    while failures < len(past) and past[failures].state is PackState.FAILED:
        failures += 1
    if failures == 0:
        return False
    wait_s = min(BACKOFF_MAX_S, BACKOFF_S * 2.0 ** (failures - 1))
    closed_at = past[0].closed_at
    return closed_at is not None and snapshot.now < closed_at + wait_s


def new_pack_id(snapshot: Snapshot, index: int) -> PackId:
    """Id of the round's `index`-th new pack: unique, since each opening moves on the version it is made of."""
    milliseconds, _, sequence = snapshot.version.partition("-")
    return PackId(f"pack-{int(milliseconds):x}{int(sequence) + index:04x}")
