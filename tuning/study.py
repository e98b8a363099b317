"""A study: which configuration to try next, given what came of the others. It decides and runs nothing (ask and tell).

All objectives are minimised. A trial that failed, or came back with a number that is not finite, is told as failed and
never stays pending, where it would bias every later proposal; one that was stopped early is told as stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import isfinite, isnan
from typing import Literal, Protocol

from polygraft.cluster.scores import UNSCORED, Scores
from polygraft.tuning.objectives import OBJECTIVES, Limit, Objective, known
from polygraft.tuning.space import Candidate
from polygraft.tuning.spaces.kinds import AnySpace
from polygraft.tuning.spaces.parameters import Config, InvalidConfig

ATTEMPTS = 96  # proposals for one trial before the space counts as used up
MODEL_ATTEMPTS = 12  # of them a model's own; the rest are left to chance


class TrialState(StrEnum):
    RUNNING = "running"  # asked, not told yet
    COMPLETE = "complete"
    STOPPED = "stopped"  # by the search, before its job was done
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a trial came to: one value an objective, in their order, and the held-out loss (None in records where the
    first value is it) and scores whatever they are; which job it was, what the job published, where it began, and its
    curve (`tuning/pruners/curves.py`) if it was watched.
    """

    values: tuple[float, ...]
    loss: float | None = None
    job: str | None = None
    model: str | None = None
    loss_before: float | None = None
    curve: tuple[float, ...] = ()
    scores: Scores = UNSCORED
    kind: Literal["result"] = "result"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a trial has no values."""

    reason: str
    job: str | None = None
    kind: Literal["failure"] = "failure"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """Why a trial was not trained to its end, after how many of its job's steps, its mean training loss since the
    decision before, and its curve."""

    reason: str
    step: int
    steps_total: int
    loss: float
    curve: tuple[float, ...] = ()
    job: str | None = None
    kind: Literal["stopped"] = "stopped"


Outcome = Result | Failure | Stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One configuration that was asked for; `told` is how many results the sampler knew then, and `unseen` which trials
    before it had not been told; it was the sampler's proposal number `attempt`. It takes its job's steps up to the
    share `until`, and goes on from the trial `parent`, if there is one. `outcome` is None while it runs.
    """

    number: int
    config: Config
    candidate: Candidate
    told: int
    unseen: tuple[int, ...] = ()
    attempt: int = 0
    parent: int | None = None
    until: float = 1.0
    outcome: Outcome | None = None

    @property
    def state(self) -> TrialState:
        match self.outcome:
            case None:
                return TrialState.RUNNING
            case Result():
                return TrialState.COMPLETE
            case Stopped():
                return TrialState.STOPPED
            case Failure():
                return TrialState.FAILED

    @property
    def seen(self) -> tuple[int, ...]:
        """The trials that had been told when it was asked for."""
        unseen = frozenset(self.unseen)
        return tuple(number for number in range(self.number) if number not in unseen)

    @property
    def values(self) -> tuple[float, ...] | None:
        return self.outcome.values if isinstance(self.outcome, Result) else None

    @property
    def scores(self) -> Scores:
        """Of the held-out examples, after training."""
        return self.outcome.scores if isinstance(self.outcome, Result) else UNSCORED

    @property
    def loss(self) -> float | None:
        """Held out, after training."""
        if not isinstance(self.outcome, Result):
            return None
        return self.outcome.values[0] if self.outcome.loss is None else self.outcome.loss


@dataclass(frozen=True, slots=True)
class Part:
    """Of its job's steps those that a trial takes: up to the share `until`, on from where the trial `parent` ended."""

    parent: int | None = None
    until: float = 1.0


WHOLE = Part()


class Sampler(Protocol):
    """Proposes configurations. Same trials and same attempt, same proposal: what it knows is only what it is given."""

    def propose(self, trials: Sequence[Trial], attempt: int) -> Config:
        """The configuration of trial number len(trials); `attempt` of its proposals could not be used. Raises
        NotYet."""
        ...


class NotYet(Exception):
    """The sampler waits for trials that are running; it is to be asked again when one of them has been told."""


class Exhausted(Exception):
    """The sampler found no valid configuration that was not tried before."""


class Unmet(Exhausted):
    """Nothing meets a limit; the message names the nearest miss."""


class Study:
    """The trials of one search. `keep` sees every new version of them before anyone else does; if it raises, nothing
    has changed. With measured limits, `hope` results of which none meets them end it. `part` says which trial the
    next one goes on from, and up to which share of its steps.
    """

    def __init__(  # noqa: PLR0913
        self,
        space: AnySpace,
        objectives: Sequence[Objective],
        sampler: Sampler,
        *,
        limits: Sequence[Limit] = (),
        hope: int | None = None,
        trials: Sequence[Trial] = (),
        part: Callable[[Sequence[Trial]], Part] = lambda trials: WHOLE,
        keep: Callable[[tuple[Trial, ...]], None] = lambda trials: None,
    ) -> None:
        self.space = space
        self.objectives = tuple(objectives)
        self.limits = tuple(limits)
        self._sampler = sampler
        self._hope = hope
        self._trials = tuple(trials)
        self._part = part
        self._keep = keep

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials; the one with number n is at index n."""
        return self._trials

    @property
    def front(self) -> tuple[Trial, ...]:
        """Those within the limits that no other one of them beats."""
        return pareto([trial for trial in self._trials if excess(trial, self.objectives, self.limits) == 0])

    def ask(self) -> Trial:
        """A new trial, running from now on. Raises NotYet; Exhausted, Unmet where a limit is what leaves nothing."""
        self._check_hope()
        part = self._part(self._trials)
        tried = {trial.candidate for trial in self._trials if trial.parent == part.parent}
        misses: list[tuple[float, str]] = []
        for attempt in range(ATTEMPTS):
            config = self._sampler.propose(self._trials, attempt)
            try:
                candidate = self.space.candidate(config)
            except InvalidConfig:
                continue
            miss = self._known_miss(candidate)
            if miss is not None:
                misses.append(miss)
            elif candidate not in tried:
                return self._ask(config, candidate, attempt, part)
        if len(misses) > ATTEMPTS // 2:
            raise Unmet(f"limits: of {ATTEMPTS} proposals {len(misses)} miss one; the nearest: {min(misses)[1]}")
        raise Exhausted(
            f"{ATTEMPTS} proposals in a row were invalid or tried before, after {len(tried)} trials; widen the space"
        )

    def tell(self, number: int, outcome: Outcome) -> Trial:
        """The trial with its outcome. Raises ValueError for one that is not running, or a wrong number of values."""
        if not 0 <= number < len(self._trials) or self._trials[number].state is not TrialState.RUNNING:
            raise ValueError(f"number: trial {number} is not running; it was never asked, or was told before")
        if isinstance(outcome, Result):
            outcome = self._checked(outcome)
        trial = replace(self._trials[number], outcome=outcome)
        self._change((*self._trials[:number], trial, *self._trials[number + 1 :]))
        return trial

    def _ask(self, config: Config, candidate: Candidate, attempt: int, part: Part) -> Trial:
        told = sum(trial.state is TrialState.COMPLETE for trial in self._trials)
        unseen = tuple(trial.number for trial in self._trials if trial.outcome is None)
        trial = Trial(
            number=len(self._trials),
            config=dict(config),
            candidate=candidate,
            told=told,
            unseen=unseen,
            attempt=attempt,
            parent=part.parent,
            until=part.until,
        )
        self._change((*self._trials, trial))
        return trial

    def _known_miss(self, candidate: Candidate) -> tuple[float, str] | None:
        """By what share a candidate is above a known limit, and how a person is told."""
        for limit in self.limits:
            if OBJECTIVES[limit.name].known:
                value = known(limit.name, candidate.peft, self.space.shape)
                if value > limit.most:
                    return value / limit.most - 1, f"{candidate.peft} with {value:g} {limit.name}, not {limit.most:g}"
        return None

    def _check_hope(self) -> None:
        """Raises Unmet when enough results are there and none meets the measured limits."""
        done = [trial for trial in self._trials if trial.values is not None]
        if self._hope is None or not self.limits or len(done) < self._hope:
            return
        nearest = min(done, key=lambda trial: (excess(trial, self.objectives, self.limits), trial.number))
        if excess(nearest, self.objectives, self.limits) > 0:
            named = zip(self.objectives, nearest.values or (), strict=True)
            values = ", ".join(one.shown(value) for one, value in named)
            limits = ", ".join(OBJECTIVES[limit.name].shown(limit.most) for limit in self.limits)
            raise Unmet(
                f"limits: none of {len(done)} results is within {limits}; the nearest miss is trial {nearest.number}, "
                f"{nearest.candidate.peft}, with {values}"
            )

    def _checked(self, result: Result) -> Result | Failure:
        if len(result.values) != len(self.objectives):
            raise ValueError(f"values: {len(result.values)} for {len(self.objectives)} objectives")
        for objective, value in zip(self.objectives, result.values, strict=True):
            if objective.score and isnan(value):
                told = ", ".join(result.scores.told) or "no score"
                reason = f"objectives: the held-out examples tell no {objective.name}; they tell {told}"
                return Failure(reason=reason, job=result.job)
            if not isfinite(value) or (objective.log and value <= 0):
                return Failure(reason=f"{objective.name} is {value}", job=result.job)
        return result

    def _change(self, trials: tuple[Trial, ...]) -> None:
        self._keep(trials)
        self._trials = trials


def excess(trial: Trial, objectives: Sequence[Objective], limits: Sequence[Limit]) -> float:
    """By how much, each in shares of its limit, a trial's values are above the limits; 0 without values."""
    values = dict(zip((objective.name for objective in objectives), trial.values or (), strict=False))
    over = ((values[limit.name] - limit.most, limit.most) for limit in limits if limit.name in values)
    return sum(max(0.0, miss) / max(abs(most), 1e-9) for miss, most in over)


def as_seen(trials: Sequence[Trial], number: int) -> tuple[Trial, ...]:
    """What the sampler was given when it proposed trial `number`: of the trials before it, the outcomes that had been
    told. `sampler.propose(as_seen(trials, number), trials[number].attempt)` proposes the same again."""
    unseen = frozenset(trials[number].unseen)
    return tuple(replace(trial, outcome=None) if trial.number in unseen else trial for trial in trials[:number])


def pareto(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The complete trials that no other one beats in one objective without losing in another; the last objective
    ascends.
    """
    done = [(trial, trial.values) for trial in trials if trial.values is not None]
    front = [(trial, values) for trial, values in done if not any(dominates(other, values) for _, other in done)]
    return tuple(trial for trial, _ in sorted(front, key=lambda pair: (*reversed(pair[1]), pair[0].number)))


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return tuple(one) != tuple(other) and all(a <= b for a, b in zip(one, other, strict=True))
