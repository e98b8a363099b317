"""What is searched and how: a space, the job that every trial is but for its graft and learning rate, and how many
trials.

A plan is a value that the study's record keeps, so that whoever goes on with the search goes on with the same one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import JsonValue

from polygraft.cluster.spec import BadRequest, FineTuningRequest, read_request
from polygraft.tuning.samplers.optuna import Model, OptunaSampler
from polygraft.tuning.spaces.kinds import AnySpace
from polygraft.tuning.study import Objective

LOSS = Objective("loss")
PARAMETERS = Objective("parameters", log=True)

_NAME = re.compile(r"[a-z0-9-]{1,35}", re.ASCII)


class BadPlan(ValueError):
    """A plan that cannot be carried out; the message names the field, the value and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """A search for grafts of low held-out loss and few trainable parameters.

    `job` is a request without a graft, learning rate, owner and suffix, and with a validation file: every trial fills
    these in. `startup` trials are spread evenly before the model proposes. At most `concurrency` run at once, in one
    pack if it has room. A trial that nobody has spoken for in `lease_s` seconds is cancelled by the service.
    """

    name: str
    space: AnySpace
    job: FineTuningRequest
    trials: int = 12
    concurrency: int = 4
    startup: int = 4
    model: Model = "tpe"
    seed: int = 0
    lease_s: float = 60.0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise BadPlan(
                f"name: {self.name!r} does not match {_NAME.pattern}; it starts the names of the trials' grafts"
            )
        for field, value in (("trials", self.trials), ("concurrency", self.concurrency), ("startup", self.startup)):
            if value < 1:
                raise BadPlan(f"{field}: {value} is not a number of trials; give at least 1")
        if self.lease_s < 5:
            raise BadPlan(f"lease_s: {self.lease_s} is too short for a service that is busy; give at least 5")
        if self.job.validation_file is None:
            raise BadPlan("job.validation_file: missing; trials are compared by their loss on held-out examples")
        for field in ("owner", "suffix", "hyperparameters"):
            if getattr(self.job, field) is not None:
                raise BadPlan(f"job.{field}: leave it out; trials set their own, and hyperparameters go into method")

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return LOSS, PARAMETERS

    @property
    def sampler(self) -> OptunaSampler:
        return OptunaSampler(
            parameters=self.space.parameters,
            objectives=self.objectives,
            model=self.model,
            startup=self.startup,
            seed=self.seed,
        )

    def request(self, *, study: str, number: int, peft: str, learning_rate: float) -> dict[str, JsonValue]:
        """The body of a trial's job, always the same for the same trial. Raises BadPlan if the API would refuse it."""
        body: dict[str, JsonValue] = self.job.model_dump(mode="json", exclude_unset=True)
        supervised = self.job.method.supervised if self.job.method else None
        given = supervised.hyperparameters if supervised else None
        hyperparameters: dict[str, JsonValue] = given.model_dump(mode="json", exclude_unset=True) if given else {}
        hyperparameters |= {"peft": peft, "learning_rate": learning_rate}
        body["method"] = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
        body["suffix"] = f"{self.name}-{number}"
        body["owner"] = {"name": f"{study}/{number}", "lease_s": self.lease_s}
        body["metadata"] = {**(self.job.metadata or {}), "study": study, "trial": str(number)}
        try:
            read_request(body)
        except BadRequest as error:
            raise BadPlan(f"job.{error.param or ''}: {error}") from None
        return body
