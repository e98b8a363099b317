"""Which streams an engine's next step computes, tenant by tenant in turn: who leaves, who enters, how many rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from polygraft.cluster.model import TenantId
from polygraft.cluster.policy.entry import blocks_for, may_enter
from polygraft.cluster.policy.fairness import Ledger, in_turn

_ANYBODY = TenantId("")  # where there is but one tenant


@dataclass(frozen=True, slots=True)
class Running:
    """A stream in the cache: `left` rows to compute (1 while decoding), at least `min_chunk` of them in its next step,
    blocks `held` and `missing` for the next row."""

    id: str
    left: int
    held: int
    missing: int
    min_chunk: int = 1
    tenant: TenantId = _ANYBODY

    @property
    def cost(self) -> float:
        """Nothing more: it was paid for when it entered."""
        return 0.0

    @property
    def overdue(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Waiting:
    """A stream without cache blocks: `left` rows to compute, at least `min_chunk` of them in its first step; with its
    graft's prefix they fill `slots` cache slots. `cost` and `overdue` as in fairness.py."""

    id: str
    left: int
    slots: int
    min_chunk: int = 1
    tenant: TenantId = _ANYBODY
    cost: float = 0.0
    overdue: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Do it in this order: `evicted` give up their blocks and go back to their places in the queue, `admitted` get
    blocks for all their slots, then `chunks` (stream, rows) are computed."""

    evicted: tuple[str, ...]
    admitted: tuple[str, ...]
    chunks: tuple[tuple[str, int], ...]


def admit_streams(  # noqa: PLR0913
    waiting: Sequence[Waiting],
    running: Sequence[Running],
    *,
    ledger: Ledger,
    free_blocks: int,
    block_size: int,
    max_streams: int,
    rows: int,
) -> StepPlan:
    """The next step over `running`, longest here first, and `waiting`, oldest first, with at most `rows` rows; a chunk
    whose `min_chunk` is more may go beyond, and is the last.

    Decoding streams get a row each. Then prompts that are being computed and new streams come in turn; new ones are
    admitted while `may_enter` says so, or while a tenant with a greater share makes room. The first that does not fit
    stops the queue, as does one of a tenant that just had to give up blocks. Long prompts of others at most double the
    step of the tenant that is first in turn (`_Rows`).
    """
    places, step = _Places(list(running), ledger, free_blocks), _Rows(rows)
    places.make_room_to_grow()
    for stream in places.streams:
        if stream.left == 1 and step.left > 0:
            step.give(stream, step.left)
    admitted: list[str] = []
    closed = False
    prompts = [stream for stream in places.streams if stream.left > 1]
    candidates: list[Running | Waiting] = [*prompts, *waiting]
    for candidate in in_turn(candidates, ledger, places.count):
        if step.left < 1:
            break
        if isinstance(candidate, Running):
            if candidate.id not in places.evicted:
                step.give_prompt(candidate)
            continue
        if step.holds_back(candidate):
            continue
        needed = blocks_for(candidate.slots, block_size)
        closed = (
            closed or candidate.tenant in places.gave_up or not places.make_room_for(candidate, needed, max_streams)
        )
        if closed:
            continue
        step.take_back(places.evicted)
        places.enter(candidate, needed)
        admitted.append(candidate.id)
        step.give_prompt(candidate)
    return StepPlan(tuple(places.evicted), tuple(admitted), tuple(step.chunks.items()))


class _Rows:
    """The rows of a step while it is being chosen: `chunks` so far, and how many are `left`.

    A prompt is long when it is not the tenant's that is first in turn, and has more rows than the step has without long
    ones. All long ones together get as many rows as that: whoever is first in turn waits for at most twice the step,
    and a long prompt that others always come before still has half of every step.
    """

    def __init__(self, rows: int) -> None:
        self.left = rows
        self.chunks: dict[str, int] = {}
        self._first: TenantId | None = None
        self._long: set[str] = set()

    def give(self, stream: Running | Waiting, most: int) -> None:
        self.chunks[stream.id] = max(stream.min_chunk, min(stream.left, most))
        self.left -= self.chunks[stream.id]

    def give_prompt(self, stream: Running | Waiting) -> None:
        """What is left, or what long ones may have; a row at least."""
        most = self.left
        if self._is_long(stream):
            most = min(most, self._for_long())
            self._long.add(stream.id)
        if self._first is None:
            self._first = stream.tenant
        self.give(stream, most)

    def holds_back(self, stream: Waiting) -> bool:
        """Whether it must have more rows at once than long ones may: it comes when its tenant is first in turn."""
        return self._is_long(stream) and stream.min_chunk > max(1, self._for_long())

    def take_back(self, streams: Collection[str]) -> None:
        for id in streams:
            self.left += self.chunks.pop(id, 0)

    def _is_long(self, stream: Running | Waiting) -> bool:
        return self._first not in (None, stream.tenant) and stream.left > self._without_long()

    def _for_long(self) -> int:
        return 2 * self._without_long() - sum(self.chunks.values())

    def _without_long(self) -> int:
        return sum(rows for id, rows in self.chunks.items() if id not in self._long)


class _Places:
    """The streams that stay, and the blocks that are free beside them, while a step is being chosen."""

    def __init__(self, streams: list[Running], ledger: Ledger, free: int) -> None:
        self.streams, self._ledger, self._free = streams, ledger, free
        self.count = Counter(stream.tenant for stream in streams)
        self.evicted: list[str] = []
        self.gave_up: set[TenantId] = set()
        self._entered = 0
        self._grown = False

    def make_room_to_grow(self) -> None:
        """Evict until all that stay have the blocks for their next rows, and take these."""
        while self.streams and sum(stream.missing for stream in self.streams) > self._free:
            self._evict(self._last_of(max({stream.tenant for stream in self.streams}, key=self._size)))
        self._free -= sum(stream.missing for stream in self.streams)
        self._grown = True

    def make_room_for(self, new: Waiting, needed: int, max_streams: int) -> bool:
        """Whether `new` may enter, if need be in the place of streams of tenants that have a greater share of the
        streams even without them, and were served no less."""
        kept = list(self.streams), Counter(self.count), list(self.evicted), set(self.gave_up), self._free
        while not may_enter(
            needed,
            running=len(self.streams) + self._entered,
            free_blocks=self._free,
            max_streams=max_streams,
        ):
            larger = [tenant for tenant in self.count if self._yields(tenant, new)]
            if not larger:
                self.streams, self.count, self.evicted, self.gave_up, self._free = kept
                return False
            self._evict(self._last_of(max(larger, key=self._size)))
        return True

    def enter(self, new: Waiting, needed: int) -> None:
        self._free -= needed
        self.count[new.tenant] += 1
        self._entered += 1

    def _yields(self, tenant: TenantId, new: Waiting) -> bool:
        """Whether a stream of `tenant` goes for `new`. Those that were admitted in this step stay."""
        if tenant == new.tenant or not any(stream.tenant == tenant for stream in self.streams):
            return False
        without = self._ledger.share(tenant, self.count[tenant] - 1)
        served_more = new.overdue or self._ledger.counter(tenant) >= self._ledger.counter(new.tenant)
        return served_more and without >= self._ledger.share(new.tenant, self.count[new.tenant] + 1)

    def _size(self, tenant: TenantId) -> tuple[float, float, int]:
        """By which the tenant that has most is found: its share, its counter, then how late its last one came."""
        last = max(at for at, stream in enumerate(self.streams) if stream.tenant == tenant)
        return self._ledger.share(tenant, self.count[tenant]), self._ledger.counter(tenant), last

    def _last_of(self, tenant: TenantId) -> Running:
        return next(stream for stream in reversed(self.streams) if stream.tenant == tenant)

    def _evict(self, stream: Running) -> None:
        self.streams.remove(stream)
        self.count[stream.tenant] -= 1
        self.evicted.append(stream.id)
        self.gave_up.add(stream.tenant)
        self._free += stream.held + (stream.missing if self._grown else 0)
