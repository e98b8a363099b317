"""Whose turn it is in an engine: the Virtual Token Counter (VTC; Sheng et al. 2024, arXiv 2401.00588, algorithm 2).

A tenant's counter is what it was served, in virtual tokens divided by its weight: w_p for each token of a prompt that
is to be computed, when its request is admitted, and w_q for each token of an answer. What is computed already is no
service, as in DLPM (Cao et al. 2025, arXiv 2501.14312). The tenant with the smallest counter is next. Of any two
tenants that have requests waiting during a time, the service differs by at most 2 max(w_p L, w_q M) (theorem 4.4), L
the tokens of the longest prompt and M the most that all running streams have at their ends, prompts included.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Protocol, TypeVar

from polygraft.cluster.model import TenantId

PROMPT_TOKEN = 1.0  # w_p, virtual tokens; both as in the paper's experiments
ANSWER_TOKEN = 2.0  # w_q


def entering(tokens: int, known: int) -> float:
    """Virtual tokens that a stream costs its tenant when it enters with so many tokens, of which those `known` are
    computed already."""
    return PROMPT_TOKEN * (tokens - known)


class Turn(Protocol):
    """A stream that wants a place: `cost` is what admitting it adds to its tenant's account, in virtual tokens, and one
    that is `overdue` goes before all that are not."""

    @property
    def tenant(self) -> TenantId: ...
    @property
    def cost(self) -> float: ...
    @property
    def overdue(self) -> bool: ...


S = TypeVar("S", bound=Turn)


@dataclass(frozen=True, slots=True)
class Ledger:
    """The counters of an engine's tenants; `last` is that of whoever left the queue last."""

    weights: Mapping[TenantId, float] = field(default_factory=dict)
    served: Mapping[TenantId, float] = field(default_factory=dict)
    last: float = 0.0

    def weight(self, tenant: TenantId) -> float:
        return self.weights.get(tenant, 1.0)

    def counter(self, tenant: TenantId) -> float:
        return self.served.get(tenant, 0.0)

    def joined(self, tenant: TenantId, queued: Collection[TenantId]) -> Ledger:
        """`tenant` has a request waiting, and had none; `queued` are those who have. What it left unused while it had
        none is not saved up: its counter is lifted to the least of theirs."""
        least = min((self.counter(one) for one in queued), default=self.last)
        return self._with({tenant: max(self.counter(tenant), least)})

    def left(self, tenant: TenantId) -> Ledger:
        """`tenant` has no request waiting any more."""
        return Ledger(self.weights, self.served, self.counter(tenant))

    def charged(self, costs: Mapping[TenantId, float]) -> Ledger:
        """Each tenant was served that many virtual tokens."""
        return self._with({tenant: self.counter(tenant) + cost / self.weight(tenant) for tenant, cost in costs.items()})

    def share(self, tenant: TenantId, streams: int) -> float:
        """What `streams` of a tenant count beside those of another with another weight."""
        return streams / self.weight(tenant)

    def _with(self, counters: Mapping[TenantId, float]) -> Ledger:
        return Ledger(self.weights, {**self.served, **counters}, self.last)


def in_turn(streams: Iterable[S], ledger: Ledger, running: Mapping[TenantId, int]) -> Iterator[S]:
    """`streams`, each tenant's in the order given, in the order in which they are served.

    Each that was taken counts as served before the next is chosen. Of tenants with equal counters, the one with the
    smaller share of the `running` streams is first, then the one whose stream was given first. Overdue streams that
    are the first of their tenants go before all others, in the order given.
    """
    queues: dict[TenantId, deque[tuple[int, S]]] = {}
    for position, stream in enumerate(streams):
        queues.setdefault(stream.tenant, deque()).append((position, stream))
    counters = {tenant: ledger.counter(tenant) for tenant in queues}
    count = Counter(running)

    def key(tenant: TenantId) -> tuple[float, float, int, TenantId]:
        position, stream = queues[tenant][0]
        counter = -1.0 if stream.overdue else counters[tenant]
        share = 0.0 if stream.overdue else ledger.share(tenant, count[tenant])
        return counter, share, position, tenant

    heap = [key(tenant) for tenant in queues]
    heapify(heap)
    while heap:
        *_, tenant = heappop(heap)
        _, stream = queues[tenant].popleft()
        counters[tenant] += stream.cost / ledger.weight(tenant)
        count[tenant] += 1
        if queues[tenant]:
            heappush(heap, key(tenant))
        yield stream
