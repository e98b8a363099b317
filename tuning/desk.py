"""What the HTTP API asks about searches: whether a request makes a plan, and what a study's record says."""

from __future__ import annotations

from dataclasses import asdict

from pydantic import JsonValue, TypeAdapter, ValidationError

from polygraft.cluster.spec import BadRequest
from polygraft.cluster.told import Told
from polygraft.cluster.validation import explain
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError
from polygraft.tuning.finals import Member, members
from polygraft.tuning.plan import BadPlan
from polygraft.tuning.record import StudyRecord, decode, encode
from polygraft.tuning.request import SearchRequest
from polygraft.tuning.study import Trial, excess, pareto


class Desk:
    """Without a state of its own."""

    def begin(
        self, body: JsonValue, *, backbone: str, shape: ModelShape, quantised: bool
    ) -> tuple[str, str, dict[str, str]]:
        """The name of a new search, the body of its study's record, and the ids of its files by field. Raises
        ValueError that names the field, the value and the choices."""
        try:
            asked = SearchRequest.model_validate(body)
        except ValidationError as error:
            raise ValueError(explain(error, SearchRequest)[1]) from None
        try:
            plan = asked.plan(backbone=backbone, shape=shape, quantised=quantised)
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
        within = [trial for trial in study.trials if excess(trial, plan.objectives, plan.limits) == 0]
        return Told(
            objectives=plan.minimise,
            trials_total=plan.trials,
            trials=tuple(map(shown, study.trials)),
            front=tuple(trial.number for trial in pareto(within)),
            finals=tuple(asdict(member) for member in members(study.trials, study.finals, plan.measured)),
            chosen=study.chosen,
            job=plan.job.model_dump(mode="json", exclude_unset=True),
            shape=asdict(plan.space.shape),
        )


def shown(trial: Trial) -> dict[str, JsonValue]:
    """A trial as JSON: what its record has, its state, and its loss."""
    body: dict[str, JsonValue] = _TRIAL.dump_python(trial, mode="json")
    return {**body, "state": trial.state.value, "loss": trial.loss}


def read(body: dict[str, JsonValue]) -> Trial:
    """Inverse of `shown`."""
    return _TRIAL.validate_python({name: value for name, value in body.items() if name not in ("state", "loss")})


def read_member(body: dict[str, JsonValue]) -> Member:
    """A member of the front as `Told` has it."""
    return _MEMBER.validate_python(body)


_TRIAL: TypeAdapter[Trial] = TypeAdapter(Trial)
_MEMBER: TypeAdapter[Member] = TypeAdapter(Member)
