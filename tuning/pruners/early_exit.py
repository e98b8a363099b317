"""Early exit on loss trajectories, after ALTO (arXiv 2604.05426), with a threshold that the study itself gives.

ALTO stops a trial, after a warm-up, when its loss trails the best by thresholds that are set by hand. Here the trials
that were trained to their ends say what a curve comes to: their held-out losses are regressed on all that their curves
had said up to this look and on what was known of them before (`tuning/pruners/curves.py:Curve.traits`), and a trial is
stopped when its chance to end below the best of them is less than `times` that of a trial of which nothing is known,
which is one in as many as there are; so whoever may be the best of all is in as much danger, early or late. Curves
cross (a higher rate starts worse and ends better), so it is not its last loss alone that speaks; but one that has never
been above the best so far is not stopped, nor one whose curve and traits do not make its chance less than the ends by
themselves do. The best is the best of those that are no larger in what else is minimised.

Regression is Bayesian, since there are fewer ends than numbers that may speak of them: `chance_below` has the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtr  # type: ignore[import-untyped]

from polygraft.tuning.pruners.curves import Curve

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOOKS = 48
TIMES = 2.0
FEWEST = 4  # ended trials: with fewer the model says next to nothing
VARIANCES = 10.0 ** np.arange(-2, 4)  # of what a block explains, in variances of what is left over


@dataclass(frozen=True, slots=True)
class EarlyExit:
    looks_at_most: int = LOOKS
    times: float = TIMES

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
        blocks = (
            _block([curve.losses[: len(own.losses)] for curve, _ in ended.values()], own.losses, by_column=False),
            _block([curve.traits for curve, _ in ended.values()], own.traits, by_column=True),
        )
        ends = [end for _, end in ended.values()]
        chance = chance_below(rivals[best], blocks, ends)
        blindly = chance_below(rivals[best], (_block([()] * len(ends), (), by_column=True),), ends)
        if chance is None or blindly is None or chance >= min(self.times / (len(curves) + 1), blindly):
            return None
        return (
            f"by the curves of {len(ended)} others its chance to end below {rivals[best]:.3f}, where trial {best} has "
            f"ended, is {chance:.1%}, and one of {len(curves) + 1} trials is the best"
        )


Block = tuple["NDArray[np.float64]", "NDArray[np.float64]"]  # [ended, numbers] and those of the trial, [numbers]


def chance_below(level: float, blocks: Sequence[Block], ends: Sequence[float]) -> float | None:
    """That a trial ends below `level`; None where there are too few ends, or all are the same.

    Ends are a common level, which may be any, plus for each block a linear function of its numbers, plus what is left
    over: normal, of a variance of which nothing is known before (density 1 / variance). A block's weights are normal,
    of a variance in units of that. Each pair of VARIANCES gives the trial's end Student's distribution; they count by
    how probable they make the ends that are there.
    """
    n, y = len(ends), np.array(ends)
    if n < FEWEST or np.ptp(y) == 0:
        return None
    scales = np.array(list(product(VARIANCES, repeat=len(blocks))))
    shares = [max(there.shape[1], 1) for there, _ in blocks]
    among = np.stack([there @ there.T / share for (there, _), share in zip(blocks, shares, strict=True)])
    across = np.stack([there @ own / share for (there, own), share in zip(blocks, shares, strict=True)])
    alone = np.array([own @ own / share for (_, own), share in zip(blocks, shares, strict=True)])
    covariance = np.einsum("sb,bij->sij", scales, among) + np.eye(n)
    column = scales @ across
    sides = np.stack([np.broadcast_to(1.0, column.shape), np.broadcast_to(y, column.shape), column], axis=2)
    ones, values, weights = np.moveaxis(np.linalg.solve(covariance, sides), 2, 0)
    total = ones.sum(axis=1)
    mean = ones @ y / total
    squares = np.maximum(values @ y - mean**2 * total, np.finfo(float).tiny)
    _, determinant = np.linalg.slogdet(covariance)
    evidence = -0.5 * (determinant + np.log(total) + (n - 1) * np.log(squares))
    probable = np.exp(evidence - evidence.max())
    expected = mean + (weights * (y - mean[:, None])).sum(axis=1)
    spread = 1 + scales @ alone - (column * weights).sum(axis=1) + (1 - weights.sum(axis=1)) ** 2 / total
    below = stdtr(n - 1, (level - expected) / np.sqrt(squares / (n - 1) * spread))
    return float(probable @ below / probable.sum())


def _block(there: Sequence[Sequence[float]], own: Sequence[float], *, by_column: bool) -> Block:
    """Numbers around their means, in units of their deviation: each column's, or the one of all. What does not differ
    among those that are there, while the trial's does, is left out: nothing says what it does."""
    x, new = np.array(there, np.float64), np.array(own, np.float64)
    centre = x.mean(axis=0)
    deviation = x.std(axis=0) if by_column else np.broadcast_to((x - centre).std(), new.shape)
    unit = np.where(deviation > 0, deviation, np.inf)
    return (x - centre) / unit, (new - centre) / unit


def _no_larger(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))
