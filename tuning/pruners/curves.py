"""What a pruner judges a trial by: its training loss between the steps at which it is looked at.

All trials of a search train on the same examples in the same order, so that the means of two trials over the same steps
are of the same tokens; in a job's first epoch every example is new to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from statistics import fmean
from typing import Protocol

from polygraft.tuning.space import Candidate
from polygraft.tuning.study import dominates


@dataclass(frozen=True, slots=True)
class Curve:
    """Of one trial the mean training loss up to its first look, from there to its second, and so on; `known` are the
    objectives that follow from its graft, `traits` what may say before training how it ends. One that was trained to
    its end has a mean for every look, and `end`, its held-out loss."""

    losses: tuple[float, ...]
    known: tuple[float, ...] = ()
    traits: tuple[float, ...] = ()
    end: float | None = None

    @property
    def finished(self) -> bool:
        return self.end is not None


class Pruner(Protocol):
    """Says which trials to stop. It knows no more than what it is given: same curves, same decision."""

    def looks(self, trial: int, steps_total: int) -> tuple[int, ...]:
        """After which steps to look at a trial, ascending, the last being the end; a step is one of the optimiser."""
        ...

    def reason_to_stop(self, curves: Mapping[int, Curve], trial: int) -> str | None:
        """Why the trial is to be stopped at the look that its curve ends with; None to go on. `curves` are those of all
        trials so far, the running and the stopped ones as far as they came."""
        ...


def means(losses: Mapping[int, float], looks: Sequence[int]) -> tuple[float, ...]:
    """The mean loss between looks, of those that have been reached; `losses` by step, from 1."""
    reached = max(losses, default=0)
    spans = [(low, high) for low, high in pairwise((0, *looks)) if high <= reached]
    return tuple(fmean(losses[step] for step in range(low + 1, high + 1) if step in losses) for low, high in spans)


def traits(candidate: Candidate) -> tuple[float, ...]:
    """Logarithms of its learning rate and of its number of parameters."""
    return log(candidate.learning_rate), log(max(candidate.parameters, 1))


def ranked(points: Mapping[int, tuple[float, ...]]) -> list[int]:
    """Trials from best to worst: by how many rounds of taking the front away they outlast, then by the first value (the
    loss), then by number."""
    left, order = dict(points), list[int]()
    while left:
        front = [n for n, own in left.items() if not any(dominates(other, own) for other in left.values())]
        order += sorted(front, key=lambda n: (left[n][0], n))
        for number in front:
            del left[number]
    return order
