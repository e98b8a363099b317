"""A search as users ask for it, in a file or over HTTP."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from polygraft.cluster.model import JobKind
from polygraft.cluster.spec import read_request
from polygraft.grafts.sites import ModelShape
from polygraft.tuning.finals import Rule
from polygraft.tuning.objectives import limit
from polygraft.tuning.plan import BadPlan, SearchPlan
from polygraft.tuning.pruners.choose import PrunerName
from polygraft.tuning.samplers.choose import SamplerName
from polygraft.tuning.space import Space
from polygraft.tuning.spaces.kinds import AnySpace
from polygraft.tuning.spaces.request import AutoPeftSpace, SpaceRequest
from polygraft.tuning.warm import Task

# Each trial is written into the study's one record, which has some hundreds of bytes for each.
Trials = Annotated[int, Field(ge=1, le=10_000)]
AtOnce = Annotated[int, Field(ge=1, le=1_000)]
Seeds = Annotated[int, Field(ge=0, le=100)]
Seed = Annotated[int, Field(ge=0, lt=1 << 31)]  # as a job's


class SearchOptions(BaseModel):
    """A search over a `space` (`tuning/spaces/request.py`); `hyperparameters` are those of every trial, as in a job,
    except peft and learning_rate. Members of the front are trained again on `seeds` other seeds, and one is chosen by
    the rule `choose`. Trials over a `supernet`, a graft that was trained with `elastic`, are its subnets, judged as
    they lie in it; the middle of the space's learning rates is for training one of them again. With a `warm_start`, a
    study's id or auto for all, the first trials are the best of earlier studies over the same space."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    name: str
    type: JobKind = "supervised"
    trials: Trials = 12
    concurrency: AtOnce = 4
    startup: Trials = 4
    sampler: SamplerName = "tpe"
    pruner: PrunerName = "none"
    objectives: tuple[str, ...] = ("loss", "parameters")
    limits: dict[str, float] = {}
    seed: Seed = 0
    seeds: Seeds = 0
    choose: Rule = "knee"
    promote: bool = False
    supernet: str | None = None
    warm_start: str | None = None
    space: SpaceRequest = AutoPeftSpace()
    hyperparameters: dict[str, JsonValue] = {}


class SearchRequest(SearchOptions):
    """Body of POST /v1/searches; the files are ids, the model the service's own when not given."""

    training_file: str
    validation_file: str
    test_file: str | None = None
    model: str | None = None

    def plan(
        self, *, backbone: str, shape: ModelShape, quantised: bool = False, task: Task | None = None
    ) -> SearchPlan:
        """Raises BadPlan, BadRequest and SpecError; `task` are statistics of the training file."""
        for name in ("peft", "learning_rate"):
            if name in self.hyperparameters:
                raise BadPlan(f"hyperparameters.{name}: leave it out; it is what trials differ in")
        asked = self.space
        if "parameters" in self.limits and asked.most is None:  # kept by construction, or refused at once
            asked = asked.model_copy(update={"most": int(self.limits["parameters"])})
        job: dict[str, JsonValue] = {
            "model": self.model or backbone,
            "training_file": self.training_file,
            "validation_file": self.validation_file,
            "method": {"type": self.type, self.type: {"hyperparameters": self.hyperparameters}},
        }
        space = asked.space(shape, quantised=quantised)
        return SearchPlan(
            name=self.name,
            space=space if self.supernet is None else one_rate(space),
            job=read_request(job),
            trials=self.trials,
            concurrency=self.concurrency,
            startup=self.startup,
            model=self.sampler,
            minimise=self.objectives,
            limits=tuple(limit(name, value) for name, value in self.limits.items()),
            pruner=self.pruner,
            supernet=self.supernet,
            task=task,
            seed=self.seed,
            seeds=self.seeds,
            choose=self.choose,
            promote=self.promote,
            test_file=self.test_file,
        )


def one_rate(space: AnySpace) -> AnySpace:
    """The space with the middle of its learning rates alone, for trials that are not trained. Raises BadPlan for one
    whose points are no subnets of a union."""
    if not isinstance(space, Space):
        raise BadPlan(
            f"supernet: the points of {space.kind} are no subnets of a union; give noah, nls or another space"
        )
    rates = space.learning_rate
    middle = sqrt(rates.low * rates.high)
    return replace(space, learning_rate=replace(rates, low=middle, high=middle * (1 + 1e-6)))
