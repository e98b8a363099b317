"""Early exit on loss trajectories, after ALTO (arXiv 2604.05426), with a threshold that the study itself gives.

ALTO stops a trial, after a warm-up, when its loss trails the best by thresholds that are set by hand. Here the trials
that were trained to their ends say what a curve comes to: their held-out losses are regressed on all that their curves
had said up to this look, and a trial is stopped when the lower bound of the prediction interval of its own is above the
lowest of them: when even a lucky end would leave it behind. Curves cross (a higher rate starts worse and ends better),
so it is not its last loss alone that speaks; but one that has never been above the best so far is not stopped. The
interval is wide when few trials have ended, and when curves say little about ends. The best is the best of those that
are no larger in what else is minimised.

Regression is ridge regression with the penalty that has the least leave-one-out error (Allen 1974), since there are
about as many looks as trials that ended; the residual variance is of those errors, each in units of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtrit  # type: ignore[import-untyped]  # of scipy.stats, which takes half a second

from polygraft.tuning.pruners.curves import Curve

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOOKS = 24
ERROR = 0.1  # that a trial which would have been the best so far is stopped at a look
FEWEST = 4  # ended trials: with three there is one degree of freedom at most, and the bound says nothing
PENALTIES = 10.0 ** np.arange(-4.0, 1.5, 0.5)  # in shares of the largest squared singular value


@dataclass(frozen=True, slots=True)
class EarlyExit:
    looks_at_most: int = LOOKS

    def looks(self, trial: int, steps_total: int) -> tuple[int, ...]:
        """Evenly over the steps."""
        steps = (-(-steps_total * look // self.looks_at_most) for look in range(1, self.looks_at_most + 1))
        return tuple(dict.fromkeys(steps))

    def reason_to_stop(self, curves: Mapping[int, Curve], trial: int) -> str | None:
        own = curves[trial]
        ended = {number: (curve, curve.end) for number, curve in sorted(curves.items()) if curve.end is not None}
        rivals = {number: end for number, (curve, end) in ended.items() if _no_larger(curve.known, own.known)}
        if own.finished or not rivals:
            return None
        best = min(rivals, key=lambda number: (rivals[number], number))
        if all(now <= then for now, then in zip(own.losses, curves[best].losses, strict=False)):
            return None
        so_far = [curve.losses[: len(own.losses)] for curve, _ in ended.values()]
        bound = lower_bound(so_far, [end for _, end in ended.values()], own.losses, ERROR)
        if bound is None or bound <= rivals[best]:
            return None
        return (
            f"by the curves of {len(ended)} others it ends above {bound:.3f}, where trial {best} has {rivals[best]:.3f}"
        )


def lower_bound(
    curves: Sequence[Sequence[float]], ends: Sequence[float], curve: Sequence[float], error: float
) -> float | None:
    """Below what the end of `curve` lies with probability `error`, by ridge regression of `ends` on `curves`, which
    are as long as it; None where they do not say."""
    n = len(ends)
    if n < FEWEST:
        return None
    x, y = np.array(curves, np.float64), np.array(ends, np.float64)
    centre, level = x.mean(axis=0), float(y.mean())
    left, singular, right = np.linalg.svd(x - centre, full_matrices=False)
    squares = np.square(singular)
    if squares[0] <= 0:
        return None
    penalties = PENALTIES * squares[0]
    kept = squares[:, None] / (squares[:, None] + penalties)  # of each direction, by penalty
    turned = left.T @ (y - level)
    leverage = np.square(left) @ kept + 1 / n
    errors = (y - level)[:, None] - left @ (kept * turned[:, None])
    freedom = n - 1 - kept.sum(axis=0)
    left_out = np.square(errors / _positive(1 - leverage)).mean(axis=0)
    left_out[freedom < 1] = np.inf
    chosen = int(left_out.argmin())
    if not np.isfinite(left_out[chosen]):
        return None
    residual = float((np.square(errors[:, chosen]) / _positive(1 - leverage[:, chosen])).mean())
    place = (right @ (np.array(curve) - centre)) * singular / (squares + penalties[chosen])
    deviation = sqrt(residual * (1 + 1 / n + float(np.square(place).sum())))
    return level + float(place @ turned) - float(stdtrit(freedom[chosen], 1 - error)) * deviation


def _positive(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(values, 1e-12)


def _no_larger(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))
