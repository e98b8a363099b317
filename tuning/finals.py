"""The last step of a search: members of its front trained again on several seeds, and one chosen by a rule. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt
from statistics import fmean, stdev
from typing import Literal

from scipy.stats import t  # type: ignore[import-untyped]

from polygraft.tuning.study import Trial

Rule = Literal["knee", "best"]
MEMBERS = 5  # of the front that are trained again, evenly from the smallest to the best
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """A trial trained again with another seed; `loss` is on the examples that the search has not seen, None when its
    job failed."""

    trial: int
    seed: int
    job: str
    model: str | None = None
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """A trial of the front with what its seeds came to: the mean loss and half the width of its confidence interval
    (0 for one seed)."""

    trial: int
    parameters: int
    loss: float
    half_width: float
    seeds: int


def retrained(front: Sequence[Trial], most: int = MEMBERS) -> tuple[Trial, ...]:
    """The trials to train again: all of a small front, else the smallest, the best, and evenly between."""
    ordered = sorted(front, key=lambda trial: (trial.candidate.parameters, trial.number))
    if len(ordered) <= most:
        return tuple(ordered)
    return tuple(ordered[round(index * (len(ordered) - 1) / (most - 1))] for index in range(most))


def members(trials: Sequence[Trial], finals: Sequence[Final]) -> tuple[Member, ...]:
    """Of every trial that has finals with a loss, from the smallest up."""
    found: list[Member] = []
    for number in sorted({final.trial for final in finals}):
        losses = [final.loss for final in finals if final.trial == number and final.loss is not None]
        if losses:
            found.append(Member(number, trials[number].candidate.parameters, fmean(losses), _half(losses), len(losses)))
    return tuple(sorted(found, key=lambda member: (member.parameters, member.trial)))


def chosen(found: Sequence[Member], rule: Rule) -> Member | None:
    """`best`: the lowest mean loss. `knee`: where a front over the logarithm of size bends most, which is the member
    farthest below the line between its smallest and its best (Das 1999); the best where there are fewer than three.
    Members
    that are larger and no better than another are no part of it. None without any."""
    if not found:
        return None
    best = min(found, key=lambda member: (member.loss, member.parameters, member.trial))
    front = [one for one in found if not any(_beats(other, one) for other in found)]
    if rule == "best" or len(front) < 3:
        return best
    low, high = min(front, key=lambda m: m.parameters), max(front, key=lambda m: m.parameters)
    if low.parameters == high.parameters or low.loss == high.loss:
        return best

    def below(member: Member) -> float:
        along = (log(member.parameters) - log(low.parameters)) / (log(high.parameters) - log(low.parameters))
        return 1 - along - (member.loss - high.loss) / (low.loss - high.loss)

    return max(front, key=lambda member: (below(member), -member.parameters, -member.trial))


def _beats(one: Member, other: Member) -> bool:
    no_worse = one.parameters <= other.parameters and one.loss <= other.loss
    return no_worse and (one.parameters, one.loss) != (other.parameters, other.loss)


def _half(losses: Sequence[float]) -> float:
    n = len(losses)
    return 0.0 if n < 2 else float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(losses) / sqrt(n)
