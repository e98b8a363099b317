"""Early exit on loss trajectories, after ALTO (arXiv 2604.05426), with a threshold that the study itself gives.

ALTO stops a trial when its loss trails the best by thresholds that are set by hand. Here the trials that were trained
to their end say how far a gap at this look is made good: their gaps to the best one at the end are regressed on those
now (ordinary least squares), and a trial is stopped when the lower bound of the prediction interval of its own gap at
the end is above 0: when even a lucky end would leave it behind. The interval is wide when few trials ended, and when
gaps now say little about those at the end. The best is the best of those that are no larger in what else is minimised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import fmean

from scipy.stats import t  # type: ignore[import-untyped]

from polygraft.tuning.pruners.curves import Curve

LOOKS = 10
ERROR = 0.05  # that a trial is stopped which would have overtaken the best, over all of its looks
FEWEST = 3  # ended trials beside the best: with two a line has no residuals


@dataclass(frozen=True, slots=True)
class EarlyExit:
    looks_at_most: int = LOOKS

    def looks(self, trial: int, steps_total: int) -> tuple[int, ...]:
        """After every tenth of the steps. The first is the warm-up: nothing is judged by its loss alone."""
        steps = (-(-steps_total * look // self.looks_at_most) for look in range(1, self.looks_at_most + 1))
        return tuple(dict.fromkeys(steps))

    def reason_to_stop(self, curves: Mapping[int, Curve], trial: int) -> str | None:
        own = curves[trial]
        look = len(own.losses) - 1
        ended = {number: curve for number, curve in curves.items() if curve.finished and number != trial}
        rivals = [number for number, curve in ended.items() if _no_larger(curve.known, own.known)]
        if own.finished or look < 1 or not rivals:
            return None
        best = min(rivals, key=lambda number: (ended[number].losses[-1], number))
        others = [curve for number, curve in sorted(ended.items()) if number != best]
        pairs = [(c.losses[look] - ended[best].losses[look], c.losses[-1] - ended[best].losses[-1]) for c in others]
        now = own.losses[look] - ended[best].losses[look]
        bound = lower_bound(pairs, now, ERROR / (self.looks_at_most - 2))
        if bound is None or bound <= 0:
            return None
        ended_too = f"by what {len(pairs)} others made good at least {bound:.3f} in the end"
        return f"{now:.3f} above trial {best} now, and {ended_too}"


def lower_bound(pairs: list[tuple[float, float]], x: float, error: float) -> float | None:
    """Below what y lies at `x` with probability `error`, by least squares over (x, y); None where they do not say."""
    n = len(pairs)
    if n < FEWEST:
        return None
    mean_x, mean_y = fmean(a for a, _ in pairs), fmean(b for _, b in pairs)
    spread = sum((a - mean_x) ** 2 for a, _ in pairs)
    if spread <= 0:
        return None
    slope = sum((a - mean_x) * (b - mean_y) for a, b in pairs) / spread
    residual = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in pairs) / (n - 2)
    deviation = sqrt(residual * (1 + 1 / n + (x - mean_x) ** 2 / spread))
    return float(mean_y + slope * (x - mean_x) - t.ppf(1 - error, n - 2) * deviation)


def _no_larger(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))
