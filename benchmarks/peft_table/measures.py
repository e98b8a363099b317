"""What a replay came to: simple regret and hypervolume after so many trials or tokens, and whether the best was
stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peft_table.replay import Ran, View


@dataclass(frozen=True, slots=True)
class Measured:
    """`regret`: by how much the row that the study would choose is worse than the best of the space, in nats of the
    mean over all seeds. `volume`: of what its front is worth, in shares of the whole space's. `spent`: in trainings."""

    spent: float
    regret: float
    volume: float


def after_trials(view: View, ran: Sequence[Ran], count: int) -> Measured:
    """When so many trials had ended."""
    return _measured(view, ran, max(one.ended for one in ran[:count]), ran[:count])


def after_tokens(view: View, ran: Sequence[Ran], trainings: float) -> Measured | None:
    """When as many tokens had been trained as so many whole trainings take; None where the study ended before."""
    for count, one in enumerate(ran):
        if spent(view, ran, one.ended) > trainings:
            return None if count == 0 else _measured(view, ran, ran[count - 1].ended, ran[:count])
    return _measured(view, ran, ran[-1].ended, ran) if spent(view, ran, ran[-1].ended) >= 0.97 * trainings else None


def spent(view: View, ran: Sequence[Ran], now: int) -> float:
    """Steps of all trials up to a time, in whole trainings; all steps of a task have the same tokens in the mean."""
    return sum(min(max(now - one.began, 0), one.steps) for one in ran) / int(view.training.shape[1])


def saved(view: View, ran: Sequence[Ran]) -> float:
    """The share of all trials' steps that was not trained."""
    return 1 - sum(one.steps for one in ran) / (len(ran) * int(view.training.shape[1]))


def best_was_stopped(view: View, ran: Sequence[Ran]) -> bool:
    """Whether of the study's trials the one that would have ended lowest was stopped."""
    return not min(ran, key=lambda one: _finite(view.loss[one.row])).complete


def lost(view: View, ran: Sequence[Ran]) -> float:
    """By how much the chosen one's loss is above the lowest that a trial of the study would have ended with."""
    return float(view.loss[chosen(view, ran)]) - min(_finite(view.loss[one.row]) for one in ran)


def chosen(view: View, ran: Sequence[Ran]) -> int:
    """The row with the lowest loss that the study has seen."""
    complete = [one.row for one in ran if one.complete]
    return min(complete, key=lambda row: (float(view.loss[row]), row))


def hypervolume(points: NDArray[np.float64], reference: Sequence[float]) -> float:
    """The area that two minimised objectives, a row a point, have over up to the reference."""
    best, area = reference[1], 0.0
    inside = points[(points < np.asarray(reference)).all(axis=1)]
    for x, y in sorted(map(tuple, inside)):
        if y < best:
            area += (reference[0] - x) * (best - y)
            best = y
    return area


def _measured(view: View, ran: Sequence[Ran], now: int, ended: Sequence[Ran]) -> Measured:
    complete = [one.row for one in ended if one.complete]
    if not complete:
        return Measured(spent(view, ran, now), float(np.nanmax(view.truth) - np.nanmin(view.truth)), 0.0)
    regret = float(view.truth[chosen(view, ended)] - np.nanmin(view.truth))
    points = _points(view)
    seen = np.column_stack([view.loss, points[:, 1]])[complete]
    front = [
        row
        for row, own in zip(complete, seen, strict=True)
        if not ((seen <= own).all(axis=1) & (seen < own).any(axis=1)).any()
    ]
    reference = float(view.table.untrained[view.task]), float(points[:, 1].max()) + 0.01
    whole = hypervolume(points, reference)
    return Measured(spent(view, ran, now), regret, hypervolume(points[front], reference) / whole)


def _points(view: View) -> NDArray[np.float64]:
    sizes = [row.parameters for row in view.rows]
    return np.column_stack([np.nan_to_num(view.truth, nan=np.inf), np.log10(sizes)])


def _finite(loss: float) -> float:
    return float(loss) if np.isfinite(loss) else float("inf")
