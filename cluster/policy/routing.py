"""Which replica takes a request: Punica's rule (Chen et al. 2023, section 5.1) with residency, or a short queue."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from polygraft.cluster.model import GraftId, ReplicaId
from polygraft.cluster.policy.entry import blocks_for, ever_fits, may_enter


class RefusalReason(StrEnum):
    NO_REPLICA = "no_replica"  # none is up, or all that are up were tried; HTTP 503
    TOO_LONG = "too_long"  # does not fit an empty replica; HTTP 400
    ALL_FULL = "all_full"  # every replica turned it down; HTTP 429


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: RefusalReason


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """A replica's load by its last message; `blocks` are all of its key-value cache, `free_blocks` those left."""

    id: ReplicaId
    running: int
    waiting: int
    blocks: int
    free_blocks: int
    resident: Collection[GraftId] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteView:
    """The replicas of one backbone, and the limits that all of them have."""

    replicas: tuple[ReplicaView, ...]
    max_streams: int
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    """`slots` are the cache slots of prompt and graft's prefix; `tried` are replicas that turned the request down. One
    that is `resumed` was under way at another replica, and goes before all that wait."""

    graft: GraftId | None
    slots: int
    tried: Collection[ReplicaId] = ()
    resumed: bool = False


def route(view: RouteView, request: RouteRequest) -> ReplicaId | Refusal:
    """The replica that has most requests running among those that can start this one at once, so that others run empty.

    Ties go to the one that holds the graft, then to the fullest cache. Where none can start it, it goes to the
    shortest queue; whether that has a place for its tenant, the replica says.
    """
    candidates = _candidates(view, request)
    if not candidates:
        return Refusal(RefusalReason.ALL_FULL if request.tried else RefusalReason.NO_REPLICA)
    possible = [one for one in candidates if ever_fits(request.slots, blocks=one.blocks, block_size=view.block_size)]
    if not possible:
        return Refusal(RefusalReason.TOO_LONG)
    if (found := starting(view, request)) is not None:
        return found
    return min(possible, key=lambda one: (one.waiting, request.graft not in one.resident, one.id)).id


def starting(view: RouteView, request: RouteRequest) -> ReplicaId | None:
    """The one that `route` takes where it can start the request at once; None where none can."""
    needed = blocks_for(request.slots, view.block_size)
    fitting = [one for one in _candidates(view, request) if starts(view, one, needed, before_others=request.resumed)]
    if not fitting:
        return None
    return max(fitting, key=lambda one: (one.running, request.graft in one.resident, -one.free_blocks, one.id)).id


def starts(view: RouteView, replica: ReplicaView, needed: int, *, before_others: bool = False) -> bool:
    """Whether its engine's next step admits the request: nobody waits before it, and it may enter."""
    return (before_others or not replica.waiting) and may_enter(
        needed, running=replica.running, free_blocks=replica.free_blocks, max_streams=view.max_streams
    )


def _candidates(view: RouteView, request: RouteRequest) -> list[ReplicaView]:
    return [replica for replica in view.replicas if replica.id not in request.tried]
