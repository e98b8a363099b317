"""What the HTTP API asks about searches: whether a request makes a plan, and what a study's record says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any

from pydantic import Field, JsonValue, TypeAdapter, ValidationError

from polygraft.cluster.ground import Ground
from polygraft.cluster.spec import BadRequest
from polygraft.cluster.told import JsonObject, Told
from polygraft.cluster.validation import explain
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError
from polygraft.tuning.finals import Member, members
from polygraft.tuning.plan import BadPlan, SearchPlan
from polygraft.tuning.record import BadRecord, StudyRecord, decode, encode
from polygraft.tuning.request import SearchRequest
from polygraft.tuning.spaces.parameters import Config, Parameter
from polygraft.tuning.study import Trial, excess, pareto
from polygraft.tuning.warm import Task, taken_over, task_of

AUTO = "auto"  # a warm start from all earlier studies


class Desk:
    """Without a state of its own."""

    def begin(self, body: JsonValue, on: Ground) -> tuple[str, str, dict[str, str]]:
        """The name of a new search, the body of its study's record, and the ids of its files by field. Raises
        ValueError that names the field, the value and the choices."""
        try:
            asked = SearchRequest.model_validate(body)
        except ValidationError as error:
            raise ValueError(explain(error, SearchRequest)[1]) from None
        try:
            task = None if on.data is None else task_of(on.data)
            plan = asked.plan(backbone=on.backbone, shape=on.shape, quantised=on.quantised, task=task)
            if asked.warm_start is not None:
                plan = replace(plan, warm=taken_over(task, dict(_best(plan, on.earlier))))
                if asked.warm_start != AUTO and not plan.warm.configs:
                    raise BadPlan(
                        f"warm_start: {asked.warm_start} has no results over this space; give a study of the same "
                        f"space, or {AUTO}"
                    )
            plan.request(study="study", number=0, peft="lora", learning_rate=1e-3)
        except (BadPlan, BadRequest, SpecError) as error:
            raise ValueError(str(error)) from None
        files = {"training_file": asked.training_file, "validation_file": asked.validation_file}
        if asked.test_file is not None:
            files["test_file"] = asked.test_file
        return plan.name, encode(StudyRecord(plan=plan)), files

    def told(self, record: str) -> Told:
        """How far a study is, and what each of its trials came to. Raises BadRecord."""
        study = decode(record)
        plan = study.plan
        needs = (plan.job.training_file, plan.job.validation_file, plan.test_file, plan.supernet)
        within = [trial for trial in study.trials if excess(trial, plan.objectives, plan.limits) == 0]
        return Told(
            objectives=plan.minimise,
            trials_total=plan.trials,
            trials=tuple(map(shown, study.trials)),
            front=tuple(trial.number for trial in pareto(within)),
            finals=tuple(map(_json, members(study.trials, study.finals, plan.measured))),
            chosen=study.chosen,
            parameters=tuple(map(_json, plan.space.parameters)),
            job=plan.job.model_dump(mode="json", exclude_unset=True),
            shape=_json(plan.space.shape),
            needs=frozenset(one for one in needs if one is not None),
        )


def _best(plan: SearchPlan, earlier: Mapping[str, str]) -> Iterator[tuple[str, tuple[Task | None, list[Config]]]]:
    """Of each study over the plan's space its task, and its front's configurations from the lowest first objective on;
    what cannot be read is left out."""
    for study, body in earlier.items():
        try:
            record = decode(body)
        except BadRecord:
            continue
        if record.plan.space == plan.space and record.plan.minimise[0] == plan.minimise[0]:
            front = sorted(pareto(record.trials), key=lambda trial: (trial.values or (), trial.number))
            yield study, (record.plan.task, [trial.config for trial in front])


def shown(trial: Trial) -> dict[str, JsonValue]:
    """A trial as JSON: what its record has, its state, and its loss."""
    body: dict[str, JsonValue] = _TRIAL.dump_python(trial, mode="json")
    return {**body, "state": trial.state.value, "loss": trial.loss}


def _json(value: Parameter | Member | ModelShape) -> JsonObject:
    """Its fields as JSON has them: a tuple, such as a condition's, is no list to whoever checks."""
    found: JsonObject = _ANY.dump_python(asdict(value), mode="json")
    return found


def axes(parameters: Sequence[Mapping[str, JsonValue]]) -> tuple[Parameter, ...]:
    """The axes of a space from what is told of them."""
    return _PARAMETERS.validate_python(parameters)


def read(body: dict[str, JsonValue]) -> Trial:
    """Inverse of `shown`."""
    return _TRIAL.validate_python({name: value for name, value in body.items() if name not in ("state", "loss")})


def read_member(body: dict[str, JsonValue]) -> Member:
    """A member of the front as `Told` has it."""
    return _MEMBER.validate_python(body)


_TRIAL: TypeAdapter[Trial] = TypeAdapter(Trial)
_PARAMETERS: TypeAdapter[tuple[Parameter, ...]] = TypeAdapter(
    tuple[Annotated[Parameter, Field(discriminator="kind")], ...]
)
_MEMBER: TypeAdapter[Member] = TypeAdapter(Member)
_ANY: TypeAdapter[Any] = TypeAdapter(Any)
