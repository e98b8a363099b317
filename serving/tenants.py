"""What each tenant of a replica was given, who of its streams is overdue, and how fast its queue moves."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence as Items

from polygraft.cluster.model import TenantId
from polygraft.cluster.policy.fairness import ANSWER_TOKEN, Ledger
from polygraft.cluster.policy.queueing import may_wait, retry_after_s
from polygraft.cluster.settings import ServeSettings
from polygraft.serving.messages import QueueFull
from polygraft.serving.sequence import Sequence

_REMEMBERED = 32  # departures from a tenant's queue that its pace is measured by


class Tenants:
    """The ledger of an engine, and the times that its promises are measured by; the engine's thread owns it, but for
    `refusal`, which any thread may ask."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self.ledger = Ledger({TenantId(name): weight for name, weight in settings.tenant_weights.items()})
        self._entered = 0
        self._queued: Counter[TenantId] = Counter()
        self._heads: dict[TenantId, tuple[Sequence, float]] = {}
        self._left: defaultdict[TenantId, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self._told: Counter[TenantId] = Counter()

    def queued(self, sequence: Sequence) -> None:
        """It waits from now on."""
        tenant = sequence.tenant
        if not self._queued[tenant]:
            self.ledger = self.ledger.joined(tenant, [one for one, count in self._queued.items() if count])
        self._queued[tenant] += 1

    def unqueued(self, sequence: Sequence) -> None:
        """It waits no longer, whatever became of it."""
        tenant = sequence.tenant
        self._queued[tenant] -= 1
        if not self._queued[tenant]:
            del self._queued[tenant]
            self.ledger = self.ledger.left(tenant)

    def entered(self, sequence: Sequence, now: float) -> None:
        """It was admitted; the first time what is to be computed of it is charged, and it gets its number."""
        if sequence.entered is not None:
            return
        tenant = sequence.tenant
        self.ledger = self.ledger.charged({tenant: sequence.cost})
        sequence.entered = self._entered
        self._entered += 1
        self._left[tenant].append(now)
        self._told[tenant] = max(0, self._told[tenant] - 1)

    def said(self, sequences: Items[Sequence]) -> None:
        """Each got a token of its answer."""
        tokens = Counter(sequence.tenant for sequence in sequences)
        self.ledger = self.ledger.charged({tenant: count * ANSWER_TOKEN for tenant, count in tokens.items()})

    def mark_overdue(self, waiting: Items[Sequence], now: float) -> None:
        """Say of each of `waiting`, in order, whether it has been the first of its tenant's for too long; one that
        another replica had has waited before."""
        heads: dict[TenantId, tuple[Sequence, float]] = {}
        for sequence in waiting:
            sequence.overdue = sequence.request.resumed
            if sequence.tenant not in heads:
                before = self._heads.get(sequence.tenant)
                first = before if before is not None and before[0] is sequence else (sequence, now)
                sequence.overdue |= now - first[1] >= self._settings.patience_s
                heads[sequence.tenant] = first
        self._heads = heads

    def refusal(self, tenant: TenantId, present: Items[Sequence], now: float) -> QueueFull | None:
        """Why one more request of `tenant` may not join those `present`, if so."""
        settings = self._settings
        own = [sequence for sequence in present if sequence.tenant == tenant]
        allowed, places = (settings.max_streams + more for more in (settings.max_queued, settings.max_queued_in_all))
        if may_wait(len(own), len(present), per_tenant=allowed, places=places):
            self._told[tenant] = 0
            return None
        oldest = min((sequence.arrival for sequence in own), default=now)
        seconds = retry_after_s(tuple(self._left[tenant]), self._told[tenant], oldest=oldest, now=now)
        self._told[tenant] += 1
        return QueueFull(seconds)
