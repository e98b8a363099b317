"""Who may wait at an engine, and when one that may not should come again."""

from __future__ import annotations

from collections.abc import Sequence

_AT_LEAST_S, _AT_MOST_S = 1.0, 3600.0


def may_wait(own: int, everybody: int, *, per_tenant: int, places: int) -> bool:
    """Whether one more request of a tenant that has `own` here may wait among `everybody`'s.

    Nobody has more than `per_tenant`, and nobody more than there is room left of all `places`: n tenants that want all
    have 1 / (n + 1) of it each, and as much is left for whoever comes new (Choudhury and Hahne 1998, dynamic
    thresholds).
    """
    return own < min(per_tenant, places - everybody)


def retry_after_s(left: Sequence[float], told: int, *, oldest: float, now: float) -> float:
    """Seconds until a place in a tenant's queue is free for a request that is refused now.

    `left` are the times at which its last requests left the queue, `told` how many were refused since and come before
    this one, and `oldest` is when the one that waits longest came: until one has left, none has in that time.
    """
    per_place = (now - left[0]) / len(left) if left else now - oldest
    return min(max(_AT_LEAST_S, (told + 1) * per_place), _AT_MOST_S)
