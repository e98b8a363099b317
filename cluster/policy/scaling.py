"""How many replicas a backbone has: as many as its streams fill at once, fewer only when that has been enough for a
while, none when nobody has asked for it for long."""

from __future__ import annotations

from dataclasses import dataclass, replace

_ROOM = 0.75  # of its places the streams may fill a set of replicas that others were taken from


@dataclass(frozen=True, slots=True)
class Demand:
    """What ingresses want of a backbone: `streams` that a replica has, `waiting` requests that met no replica."""

    streams: int = 0
    waiting: int = 0

    @property
    def total(self) -> int:
        return self.streams + self.waiting

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.streams + other.streams, self.waiting + other.waiting)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """`holds` streams fill a replica; a backbone that is asked for has at least `least` replicas, and never more than
    `most`. Replicas go when fewer have been enough for `calm_s` seconds, and the last one when nobody has asked for
    `idle_s`; None: never."""

    holds: int
    least: int
    most: int
    calm_s: float
    idle_s: float | None = None


@dataclass(frozen=True, slots=True)
class Lately:
    """What was seen `since` a time: `peaks` are (time, replicas that would do), newest last, each more than those
    behind it; `busy_at` is when somebody last asked. One that begins anew, as after a restart, only lets replicas go
    later."""

    since: float
    busy_at: float
    peaks: tuple[tuple[float, int], ...] = ()


def looked(lately: Lately, demand: Demand, scaling: Scaling, now: float) -> Lately:
    """After one more look."""
    enough = _replicas(demand, scaling.holds * _ROOM)
    kept = tuple((at, peak) for at, peak in lately.peaks if at > now - scaling.calm_s and peak > enough)
    return replace(lately, peaks=(*kept, (now, enough)), busy_at=now if demand.total else lately.busy_at)


def target(lately: Lately, demand: Demand, scaling: Scaling, current: int, now: float) -> int:
    """How many there should be, where there are `current`. `lately` holds the look at `now`."""
    needed = max(_replicas(demand, scaling.holds), scaling.least)
    if not demand.total and scaling.idle_s is not None and (now - lately.busy_at >= scaling.idle_s or not current):
        return 0
    if needed >= current or now - lately.since < scaling.calm_s:
        return min(max(needed, current), scaling.most)
    enough = max(peak for _, peak in lately.peaks)
    return min(max(needed, min(enough, current)), scaling.most)


def _replicas(demand: Demand, places: float) -> int:
    return -int(-demand.total // places)
