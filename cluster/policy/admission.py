"""Whose turn it is: the order in which waiting jobs are considered, and which jobs must stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush

from polygraft.cluster.model import Job, JobId, Limits, TenantId
from polygraft.cluster.states import Reason

PRIORITY_S = 600.0  # how much longer a job seems to wait for each of its priority

Turn = tuple[float, float, JobId]
Rank = tuple[int, float, Turn]


def turn(job: Job) -> Turn:
    """The order among a tenant's own jobs: who waits longest, by the clock and by priority, which is worth a time, so
    that none of them waits for ever."""
    return job.created_at - PRIORITY_S * job.spec.priority, job.created_at, job.id


def in_turn(
    queues: Mapping[TenantId, Sequence[Job]],
    entered: Mapping[TenantId, Sequence[tuple[float, JobId]]],
    placed: Counter[TenantId],
    left_out: Collection[TenantId],
    limits: Limits,
    now: float,
) -> Iterator[Job]:
    """Waiting jobs: the tenant with fewest jobs in packs first, counting those `placed` so far, which a turn adds to;
    then age, then id. `entered` says when those came in. Whoever joins `left_out` while it runs has no more turns.

    Before all others come a job that was overtaken for `overtake_s`, and one of a tenant that has jobs in packs and got
    no other in for `patience_s`: else tenants that come new with one job each could keep it out for ever.
    """

    def rank(tenant: TenantId, job: Job) -> Rank:
        here = entered.get(tenant, ())
        if job.blocked_at is not None and now - job.blocked_at >= limits.overtake_s:
            return 0, job.blocked_at, turn(job)
        if here and not placed[tenant]:
            since = max(job.created_at, here[-1][0])
            if now - since >= limits.patience_s:
                return 0, since, turn(job)
        return 1, float(len(here) + placed[tenant]), turn(job)

    heap = [(rank(tenant, queue[0]), tenant, 0) for tenant, queue in queues.items()]
    heapify(heap)
    while heap:
        _, tenant, at = heappop(heap)
        if tenant in left_out:
            continue
        queue = queues[tenant]
        yield queue[at]
        placed[tenant] += 1
        if at + 1 < len(queue):
            heappush(heap, (rank(tenant, queue[at + 1]), tenant, at + 1))


def stop_reason(job: Job, now: float) -> Reason | None:
    """Why an unfinished job must end; None if it may go on, or is being stopped already."""
    if job.final or job.stopping:
        return None
    if job.cancel_requested:
        return Reason.REQUESTED
    if job.lease_until is not None and job.lease_until < now:
        return Reason.OWNER_LOST
    return None
