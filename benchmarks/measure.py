"""What samples say: the ratio of two arms round by round, its bootstrap interval, and whether the worse bound holds."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

CONFIDENCE = 0.95  # one-sided: each end of an interval is passed by chance in at most 5% of resamples
RESAMPLES = 10_000
SEED = 0

Op = Literal[">=", "<"]
Quantity = Literal["speed", "memory", "bytes read"]
Samples = Sequence[Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Interval:
    """The median of some values, and the bounds that the medians of resamples keep."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Goal:
    """What a benchmark compares: `arm` over each of `rivals`; without an op it is only reported.

    Goals of one id are alternatives, of which one must hold.
    """

    id: str
    quantity: Quantity
    arm: str
    rivals: tuple[str, ...]
    op: Op | None = None
    goal: float | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A goal and what came of it against its strongest rival; `holds` is None where an arm was not measured.

    `value` is the median ratio; `low` and `high` bound it, and the bound on the far side of `op` decides.
    """

    id: str
    value: float | None
    unit: str
    goal: float | None
    op: Op | None
    holds: bool | None
    low: float | None = None
    high: float | None = None
    against: str | None = None


def interval(values: Sequence[float]) -> Interval:
    """Percentile bootstrap of the median (Efron 1979); always the same for the same values."""
    draw = random.Random(SEED)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    cut = int((1 - CONFIDENCE) * RESAMPLES)
    return Interval(median(values), medians[cut], medians[-1 - cut])


def ratios(samples: Samples, arm: str, rival: str) -> tuple[float, ...]:
    """arm / rival in every round; empty unless every round has both."""
    if not all(arm in sample and rival in sample for sample in samples):
        return ()
    return tuple(sample[arm] / sample[rival] for sample in samples)


def decide(goal: Goal, samples: Samples) -> Claim:
    """The claim against the rival that leaves the least of it. Without one of the arms nothing is claimed."""
    unit = f"times the {goal.quantity} of the strongest rival"
    found = {rival: ratios(samples, goal.arm, rival) for rival in goal.rivals}
    if not all(found.values()):
        return Claim(goal.id, None, unit, goal.goal, goal.op, None)
    intervals = {rival: interval(values) for rival, values in found.items()}
    rival = _strongest(goal, intervals)
    least = intervals[rival]
    return Claim(goal.id, least.median, unit, goal.goal, goal.op, _holds(goal, least), least.low, least.high, rival)


def all_hold(claims: Sequence[Claim]) -> bool:
    """Whether of every id a claim holds."""
    return {claim.id for claim in claims} == {claim.id for claim in claims if claim.holds}


def _holds(goal: Goal, found: Interval) -> bool | None:
    if goal.op is None or goal.goal is None:
        return None
    return found.low >= goal.goal if goal.op == ">=" else found.high < goal.goal


def _strongest(goal: Goal, intervals: Mapping[str, Interval]) -> str:
    """For memory the rival that needs the least, else the fastest; the first on a tie."""
    if goal.op == "<":
        return max(intervals, key=lambda rival: intervals[rival].high)
    return min(intervals, key=lambda rival: intervals[rival].low)
