"""Whose turn it is: the order in which waiting jobs are considered, and which jobs must stop."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from heapq import heapify, heappop, heappush

from polygraft.cluster.model import Job, TenantId
from polygraft.cluster.states import Reason


def fair_order(jobs: Iterable[Job]) -> list[Job]:
    """Waiting jobs: the tenant with fewest jobs in packs first, counting those placed so far; then age, then id."""
    active: Counter[TenantId] = Counter()
    queues: dict[TenantId, deque[Job]] = defaultdict(deque)
    for job in sorted(jobs, key=lambda job: (job.created_at, job.id)):
        if job.active:
            active[job.tenant] += 1
        elif job.waiting:
            queues[job.tenant].append(job)
    heap = [(active[tenant], queue[0].created_at, queue[0].id, tenant) for tenant, queue in queues.items()]
    heapify(heap)
    ordered: list[Job] = []
    while heap:
        turns, _, _, tenant = heappop(heap)
        queue = queues[tenant]
        ordered.append(queue.popleft())
        if queue:
            heappush(heap, (turns + 1, queue[0].created_at, queue[0].id, tenant))
    return ordered


def stop_reason(job: Job, now: float) -> Reason | None:
    """Why an unfinished job must end; None if it may go on, or is being stopped already."""
    if job.final or job.stopping:
        return None
    if job.cancel_requested:
        return Reason.REQUESTED
    if job.lease_until is not None and job.lease_until < now:
        return Reason.OWNER_LOST
    return None
