"""The last step of a search: members of its front trained again on several seeds, and one chosen by a rule. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt
from statistics import fmean, stdev
from typing import Literal

from polygraft.cluster.scores import UNSCORED, Scores
from polygraft.tuning.study import Trial

Rule = Literal["knee", "best"]
MEMBERS = 5  # of the front that are trained again, evenly from the smallest to the best
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """A trial trained again with another seed: loss and scores on the validation file, by which one is chosen, and on
    the test file, which nothing has seen. None when its job failed, or there is no test file."""

    trial: int
    seed: int
    job: str
    model: str | None = None
    loss: float | None = None
    scores: Scores = UNSCORED
    test_loss: float | None = None
    test_scores: Scores = UNSCORED


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds and half the width of its confidence interval, 0 for one seed."""

    mean: float
    half_width: float

    @staticmethod
    def of(values: Sequence[float | None]) -> Interval | None:
        """None where no seed has a value."""
        found = [value for value in values if value is not None]
        return Interval(fmean(found), _half(found)) if found else None


@dataclass(frozen=True, slots=True)
class Member:
    """A trial of the front with what its seeds came to: the mean loss and half the width of its confidence interval
    (0 for one seed), the score that the search is for, if any, and both on the test file."""

    trial: int
    parameters: int
    loss: float
    half_width: float
    seeds: int
    score: Interval | None = None
    test_loss: Interval | None = None
    test_score: Interval | None = None


def retrained(front: Sequence[Trial], most: int = MEMBERS) -> tuple[Trial, ...]:
    """The trials to train again: all of a small front, else the smallest, the best, and evenly between."""
    ordered = sorted(front, key=lambda trial: (trial.candidate.parameters, trial.number))
    if len(ordered) <= most:
        return tuple(ordered)
    return tuple(ordered[round(index * (len(ordered) - 1) / (most - 1))] for index in range(most))


def members(trials: Sequence[Trial], finals: Sequence[Final], measured: str = "loss") -> tuple[Member, ...]:
    """Of every trial that has finals with a loss, from the smallest up; their score is the one that is `measured`, or
    the one that says most."""
    score = "score" if measured == "loss" else measured
    found: list[Member] = []
    for number in sorted({final.trial for final in finals}):
        own = [final for final in finals if final.trial == number and final.loss is not None]
        loss = Interval.of([final.loss for final in own])
        if loss is not None:
            found.append(
                Member(
                    number,
                    trials[number].candidate.parameters,
                    loss.mean,
                    loss.half_width,
                    len(own),
                    Interval.of([final.scores.get(score) for final in own]),
                    Interval.of([final.test_loss for final in own]),
                    Interval.of([final.test_scores.get(score) for final in own]),
                )
            )
    return tuple(sorted(found, key=lambda member: (member.parameters, member.trial)))


def chosen(found: Sequence[Member], rule: Rule, measured: str = "loss") -> Member | None:
    """`best`: the lowest mean loss, or the highest mean score if that is `measured`. `knee`: where a front over the
    logarithm of size bends most, which is the member farthest below the line between its smallest and its best (Das
    1999); the best where there are fewer than three. Members that are larger and no better than another are no part of
    it. None without any. What the test file says plays no part."""
    if not found:
        return None

    def value(member: Member) -> float:
        return member.loss if measured == "loss" else 1.0 - (member.score.mean if member.score else 0.0)

    def beats(one: Member, other: Member) -> bool:
        pair, others = (one.parameters, value(one)), (other.parameters, value(other))
        return pair != others and all(a <= b for a, b in zip(pair, others, strict=True))

    best = min(found, key=lambda member: (value(member), member.parameters, member.trial))
    front = [one for one in found if not any(beats(other, one) for other in found)]
    if rule == "best" or len(front) < 3:
        return best
    low, high = min(front, key=lambda m: m.parameters), max(front, key=lambda m: m.parameters)
    if low.parameters == high.parameters or value(low) == value(high):
        return best

    def below(member: Member) -> float:
        along = (log(member.parameters) - log(low.parameters)) / (log(high.parameters) - log(low.parameters))
        return 1 - along - (value(member) - value(high)) / (value(low) - value(high))

    return max(front, key=lambda member: (below(member), -member.parameters, -member.trial))


def _half(losses: Sequence[float]) -> float:
    n = len(losses)
    if n < 2:
        return 0.0
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # a third of a second, before the first trial

    return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * stdev(losses) / sqrt(n)
