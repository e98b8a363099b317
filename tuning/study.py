"""A study: which configuration to try next, given what came of the others. It decides and runs nothing (ask and tell).

All objectives are minimised. A trial that failed, or came back with a number that is not finite, is told as failed and
never stays pending, where it would bias every later proposal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import isfinite
from typing import Protocol

from polygraft.tuning.space import Candidate
from polygraft.tuning.spaces.kinds import AnySpace
from polygraft.tuning.spaces.parameters import Config, InvalidConfig

ATTEMPTS = 24  # proposals for one trial before the space counts as used up


class TrialState(StrEnum):
    RUNNING = "running"  # asked, not told yet
    COMPLETE = "complete"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Objective:
    """Something to minimise. `log`: the sampler is to look at its logarithm, as for counts that span decades."""

    name: str
    log: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a trial came to: one value an objective, in their order; which job it was, what the job published, where it
    began.
    """

    values: tuple[float, ...]
    job: str | None = None
    model: str | None = None
    loss_before: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a trial has no values."""

    reason: str
    job: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One configuration that was asked for; `told` is how many results the sampler knew then. `outcome` is None while
    it runs.
    """

    number: int
    config: Config
    candidate: Candidate
    told: int
    outcome: Result | Failure | None = None

    @property
    def state(self) -> TrialState:
        match self.outcome:
            case None:
                return TrialState.RUNNING
            case Result():
                return TrialState.COMPLETE
            case Failure():
                return TrialState.FAILED

    @property
    def values(self) -> tuple[float, ...] | None:
        return self.outcome.values if isinstance(self.outcome, Result) else None


class Sampler(Protocol):
    """Proposes configurations. Same trials and same attempt, same proposal: what it knows is only what it is given."""

    def propose(self, trials: Sequence[Trial], attempt: int) -> Config:
        """The configuration of trial number len(trials); `attempt` of its proposals could not be used."""
        ...


class Exhausted(Exception):
    """The sampler found no valid configuration that was not tried before."""


class Study:
    """The trials of one search. `keep` sees every new version of them before anyone else does; if it raises, nothing
    has changed.
    """

    def __init__(
        self,
        space: AnySpace,
        objectives: Sequence[Objective],
        sampler: Sampler,
        *,
        trials: Sequence[Trial] = (),
        keep: Callable[[tuple[Trial, ...]], None] = lambda trials: None,
    ) -> None:
        self.space = space
        self.objectives = tuple(objectives)
        self._sampler = sampler
        self._trials = tuple(trials)
        self._keep = keep

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials; the one with number n is at index n."""
        return self._trials

    def ask(self) -> Trial:
        """A new trial, running from now on. Raises Exhausted."""
        tried = {trial.candidate for trial in self._trials}
        for attempt in range(ATTEMPTS):
            config = self._sampler.propose(self._trials, attempt)
            try:
                candidate = self.space.candidate(config)
            except InvalidConfig:
                continue
            if candidate not in tried:
                return self._ask(config, candidate)
        raise Exhausted(
            f"{ATTEMPTS} proposals in a row were invalid or tried before, after {len(tried)} trials; widen the space"
        )

    def tell(self, number: int, outcome: Result | Failure) -> Trial:
        """The trial with its outcome. Raises ValueError for one that is not running, or a wrong number of values."""
        if not 0 <= number < len(self._trials) or self._trials[number].state is not TrialState.RUNNING:
            raise ValueError(f"number: trial {number} is not running; it was never asked, or was told before")
        if isinstance(outcome, Result):
            outcome = self._checked(outcome)
        trial = replace(self._trials[number], outcome=outcome)
        self._change((*self._trials[:number], trial, *self._trials[number + 1 :]))
        return trial

    def _ask(self, config: Config, candidate: Candidate) -> Trial:
        told = sum(trial.state is TrialState.COMPLETE for trial in self._trials)
        trial = Trial(number=len(self._trials), config=dict(config), candidate=candidate, told=told)
        self._change((*self._trials, trial))
        return trial

    def _checked(self, result: Result) -> Result | Failure:
        if len(result.values) != len(self.objectives):
            raise ValueError(f"values: {len(result.values)} for {len(self.objectives)} objectives")
        for objective, value in zip(self.objectives, result.values, strict=True):
            if not isfinite(value) or (objective.log and value <= 0):
                return Failure(reason=f"{objective.name} is {value}", job=result.job)
        return result

    def _change(self, trials: tuple[Trial, ...]) -> None:
        self._keep(trials)
        self._trials = trials


def pareto(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The complete trials that no other one beats in one objective without losing in another; the last objective
    ascends.
    """
    done = [(trial, trial.values) for trial in trials if trial.values is not None]
    front = [(trial, values) for trial, values in done if not any(_dominates(other, values) for _, other in done)]
    return tuple(trial for trial, _ in sorted(front, key=lambda pair: (*reversed(pair[1]), pair[0].number)))


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return tuple(one) != tuple(other) and all(a <= b for a, b in zip(one, other, strict=True))
