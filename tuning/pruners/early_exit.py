"""Early exit on loss trajectories, after ALTO (arXiv 2604.05426), with a threshold that the study itself gives.

ALTO stops a trial when its loss trails the best by thresholds that are set by hand. Here the study's own curves say
what becomes of a loss: from each look to the next, the loss there is regressed on the loss here (ordinary least
squares) over all trials that came so far, the stopped ones too. A trial's loss is carried to the end in this way, its
error with it, and the trial is stopped when even the lower bound of the prediction interval lies above the best trial
that was trained to its end. The interval is wide while few trials came far, and where losses now say little about later
ones. The best is the best of those that are no larger in what else is minimised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean

from scipy.stats import t  # type: ignore[import-untyped]

from polygraft.tuning.pruners.curves import Curve

LOOKS = 10
CLOSER = 1.5  # each look is after so many times the steps of the one before: most is decided early
ERROR = 0.05  # that a trial is stopped which would have overtaken the best
FEWEST = 4  # trials that came to a look: a line through two has no residuals, through three hardly any


@dataclass(frozen=True, slots=True)
class EarlyExit:
    looks_at_most: int = LOOKS

    def looks(self, trial: int, steps_total: int) -> tuple[int, ...]:
        """After 1/38 of the steps, half as many again, and so on. The first is the warm-up: nothing is judged by it."""
        steps = (round(steps_total / CLOSER**look) for look in range(self.looks_at_most - 1, -1, -1))
        return tuple(dict.fromkeys(max(1, step) for step in steps))

    def reason_to_stop(self, curves: Mapping[int, Curve], trial: int) -> str | None:
        own = curves[trial]
        ended = {number: curve for number, curve in curves.items() if curve.finished and number != trial}
        rivals = [number for number, curve in ended.items() if _no_larger(curve.known, own.known)]
        if own.finished or len(own.losses) < 2 or not rivals:
            return None
        best = min(rivals, key=lambda number: (ended[number].losses[-1], number))
        bound = lowest_end(list(curves.values()), own.losses, len(ended[best].losses), ERROR)
        if bound is None or bound <= ended[best].losses[-1]:
            return None
        return (
            f"by what became of {len(curves) - 1} others at least {bound:.3f} in the end; "
            f"trial {best} came to {ended[best].losses[-1]:.3f}"
        )


def lowest_end(curves: Sequence[Curve], losses: Sequence[float], looks: int, error: float) -> float | None:
    """Below what the loss at the last of so many looks lies with probability `error`, for a curve that came to `losses`
    so far; None while too few came from one look to the next."""
    at, half = losses[-1], 0.0
    for look in range(len(losses) - 1, looks - 1):
        line = through([(c.losses[look], c.losses[look + 1]) for c in curves if len(c.losses) > look + 1])
        if line is None:
            return None
        half = sqrt((line.slope * half) ** 2 + line.half_width(at, error) ** 2)
        at = line.at(at)
    return at - half


@dataclass(frozen=True, slots=True)
class Line:
    """Of least squares through n points: means, slope, the sum of squares of x and the residuals' variance."""

    n: int
    mean_x: float
    mean_y: float
    slope: float
    spread: float
    variance: float

    def at(self, x: float) -> float:
        return self.mean_y + self.slope * (x - self.mean_x)

    def half_width(self, x: float, error: float) -> float:
        """How far below the line a new point at `x` lies with probability `error`."""
        deviation = sqrt(self.variance * (1 + 1 / self.n + (x - self.mean_x) ** 2 / self.spread))
        return float(t.ppf(1 - error, self.n - 2)) * deviation


def through(points: Sequence[tuple[float, float]]) -> Line | None:
    """None for fewer than FEWEST points, or such as all have one x."""
    n = len(points)
    if n < FEWEST:
        return None
    mean_x, mean_y = fmean(x for x, _ in points), fmean(y for _, y in points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if spread <= 0:
        return None
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    variance = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points) / (n - 2)
    return Line(n, mean_x, mean_y, slope, spread, variance)


def _no_larger(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))
