"""What is searched and how: a space, the job that every trial is but for its graft and learning rate, and how many
trials.

A plan is a value that the study's record keeps, so that whoever goes on with the search goes on with the same one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan

from pydantic import JsonValue

from polygraft.cluster.scores import UNSCORED, Scores
from polygraft.cluster.spec import BadRequest, FineTuningRequest, read_request
from polygraft.tuning.finals import Rule
from polygraft.tuning.objectives import Limit, Objective, check, known, objective
from polygraft.tuning.pruners.choose import PrunerName
from polygraft.tuning.samplers.choose import SamplerName, sampler
from polygraft.tuning.samplers.first import First
from polygraft.tuning.samplers.population import Population
from polygraft.tuning.spaces.kinds import AnySpace
from polygraft.tuning.study import WHOLE, Part, Sampler, Trial
from polygraft.tuning.warm import Task, WarmStart

_NAME = re.compile(r"[a-z0-9-]{1,35}", re.ASCII)


class BadPlan(ValueError):
    """A plan that cannot be carried out; the message names the field, the value and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """A search for grafts that are low in the `minimise`d objectives, within the limits.

    `job` is a request without a graft, learning rate, owner and suffix, and with a validation file: every trial fills
    these in. `startup` trials are spread evenly before the model proposes. At most `concurrency` run at once, in one
    pack if it has room. A trial that nobody has spoken for in `lease_s` seconds is cancelled by the service.

    Trials over a `supernet`, a graft's version, are its subnets with what it has of them, judged and not trained.
    `task` are statistics of the training file. What `warm` has is tried first.

    Of the front, members are trained again on `seeds` other seeds; one is chosen by a rule over the validation file
    (`tuning/finals.py`), and is what the search's name means if it is to be `promote`d. They are judged on `test_file`,
    too, by which nothing is chosen.
    """

    name: str
    space: AnySpace
    job: FineTuningRequest
    trials: int = 12
    concurrency: int = 4
    startup: int = 4
    model: SamplerName = "tpe"
    minimise: tuple[str, ...] = ("loss", "parameters")
    limits: tuple[Limit, ...] = ()
    pruner: PrunerName = "none"
    supernet: str | None = None
    task: Task | None = None
    warm: WarmStart = field(default_factory=WarmStart)
    seeds: int = 0
    choose: Rule = "knee"
    promote: bool = False
    test_file: str | None = None
    seed: int = 0
    lease_s: float = 60.0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise BadPlan(
                f"name: {self.name!r} does not match {_NAME.pattern}; it starts the names of the trials' grafts"
            )
        for what, value in (("trials", self.trials), ("concurrency", self.concurrency), ("startup", self.startup)):
            if value < 1:
                raise BadPlan(f"{what}: {value} is not a number of trials; give at least 1")
        if self.seeds < 0:
            raise BadPlan(f"seeds: {self.seeds} is not a number of seeds; give 0 for none")
        if self.promote and not self.seeds:
            raise BadPlan("promote: what is chosen are grafts that are trained again; give seeds of at least 1")
        if self.lease_s < 5:
            raise BadPlan(f"lease_s: {self.lease_s} is too short for a service that is busy; give at least 5")
        if self.job.validation_file is None:
            raise BadPlan("job.validation_file: missing; trials are compared by their loss on held-out examples")
        for what in ("owner", "suffix", "hyperparameters"):
            if getattr(self.job, what) is not None:
                raise BadPlan(f"job.{what}: leave it out; trials set their own, and hyperparameters go into method")

        if self.model == "pbt" and (self.seeds or self.pruner != "none" or self.supernet):
            why = "it stops early by itself, and no job repeats the rates of its members"
            raise BadPlan(f"sampler: pbt takes no seeds, pruner or supernet: {why}")
        if self.supernet is not None and self.pruner != "none":
            raise BadPlan("pruner: the subnets of a supernet are not trained; leave it out")
        if self.test_file is not None and self.test_file in (self.job.training_file, self.job.validation_file):
            raise BadPlan(
                f"test_file: {self.test_file} is what the search trains on or chooses by; give other examples"
            )
        try:
            check(self.minimise, self.limits)
            _ = self.sampler
        except ValueError as error:
            raise BadPlan(str(error)) from None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return tuple(map(objective, self.minimise))

    @property
    def sampler(self) -> Sampler:
        return First(self.warm.configs, self._own_sampler) if self.warm.configs else self._own_sampler

    @property
    def _own_sampler(self) -> Sampler:
        return sampler(
            self.model,
            self.space,
            self.objectives,
            limits=self.limits,
            trials=self.trials,
            startup=self.startup,
            seed=self.seed,
        )

    def part(self, trials: Sequence[Trial]) -> Part:
        """What the next trial takes of its job's steps. Raises NotYet."""
        one = self._own_sampler
        if isinstance(one, Population):
            return Part(one.parent(trials), (len(trials) // one.size + 1) / (self.trials // one.size))
        return WHOLE if self.supernet is None else Part(until=0.0)

    def rung(self, trial: Trial, trials: Sequence[Trial]) -> dict[str, JsonValue] | None:
        """The part of its steps that the job of a trial takes, None for all of them."""
        outcome = None if trial.parent is None else trials[trial.parent].outcome
        if trial.parent is None and trial.until == 1:
            return None
        return {"until": trial.until, "after": None if outcome is None else outcome.job}

    @property
    def hope(self) -> int:
        """How many results may miss the measured limits before the search ends."""
        return max(self.startup, -(-self.trials // 2))

    def known(self, peft: str) -> tuple[float, ...]:
        """The objectives that follow from a trial's graft, in their order."""
        return tuple(known(one.name, peft, self.space.shape) for one in self.objectives if one.known)

    @property
    def measured(self) -> str:
        """The first objective that only a trial tells: what configurations of one size are compared by."""
        return next(one.name for one in self.objectives if not one.known)

    def values(self, peft: str, loss: float, scores: Scores = UNSCORED) -> tuple[float, ...]:
        """A value of every objective, for a trial's graft and what was measured of it; NaN for a score that its
        examples do not tell."""

        def value(one: Objective) -> float:
            if one.known:
                return known(one.name, peft, self.space.shape)
            found = scores.get(one.name)
            return loss if not one.score else nan if found is None else 1 - found

        return tuple(map(value, self.objectives))

    def request(
        self,
        *,
        study: str,
        number: int,
        peft: str,
        learning_rate: float,
        rung: Mapping[str, JsonValue] | None = None,
    ) -> dict[str, JsonValue]:
        """The body of a trial's job, always the same for the same trial. Raises BadPlan if the API would refuse it."""
        body: dict[str, JsonValue] = self.job.model_dump(mode="json", exclude_unset=True)
        own = self.job.method.own if self.job.method else None
        given = own.hyperparameters if own else None
        hyperparameters: dict[str, JsonValue] = given.model_dump(mode="json", exclude_unset=True) if given else {}
        if rung is not None and self.supernet is not None:
            peft = f"{peft} + from(of={self.supernet})"
        hyperparameters |= {"peft": peft, "learning_rate": learning_rate}
        body["method"] = {"type": self.job.kind, self.job.kind: {"hyperparameters": hyperparameters}}
        body["suffix"] = f"{self.name}-{number}"
        body["owner"] = {"name": f"{study}/{number}", "lease_s": self.lease_s}
        body["metadata"] = {**(self.job.metadata or {}), "study": study, "trial": str(number)}
        if rung is not None:
            body["rung"] = dict(rung)
        return _read(body)

    def final_request(
        self, *, study: str, number: int, peft: str, learning_rate: float, seed: int
    ) -> dict[str, JsonValue]:
        """The body of a job that trains a trial's graft again on another seed. Raises BadPlan as `request` does."""
        body = self.request(study=study, number=number, peft=peft, learning_rate=learning_rate)
        body["seed"] = seed
        if self.test_file is not None:
            body["test_file"] = self.test_file
        body["suffix"] = self.name if self.promote else f"{self.name}-{number}"
        body["owner"] = {"name": f"{study}/final-{number}-{seed}", "lease_s": self.lease_s}
        return _read(body)


def _read(body: dict[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        read_request(body)
    except BadRequest as error:
        raise BadPlan(f"job.{error.param or ''}: {error}") from None
    return body
