"""What a search asks the service for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polygraft.cluster.spec import read_request
from polygraft.tuning.plan import BadPlan, SearchPlan
from tests.tuning.plans import plan_of

PLAN = plan_of()


def test_a_trials_job_is_the_plans_with_its_own_graft_rate_owner_and_name() -> None:
    body = PLAN.request(study="study-1", number=3, peft="serial(4)@0-1", learning_rate=2e-3)
    request = read_request(body)
    assert request.suffix == "find-3" and request.validation_file == "file-2"
    assert request.owner is not None and (request.owner.name, request.owner.lease_s) == ("study-1/3", 60.0)
    assert request.metadata == {"topic": "tests", "study": "study-1", "trial": "3"}
    spec = request.to_spec()
    assert (spec.peft, spec.learning_rate, spec.epochs, spec.batch_size) == ("serial(4)@0-1", 2e-3, 2, 4)
    assert body == PLAN.request(study="study-1", number=3, peft="serial(4)@0-1", learning_rate=2e-3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "Grafts of Eve"}, "name: 'Grafts of Eve'"),
        ({"trials": 0}, "trials: 0"),
        ({"lease_s": 1.0}, "lease_s: 1.0"),
        ({"job": PLAN.job.model_copy(update={"validation_file": None})}, "job.validation_file: missing"),
        ({"job": PLAN.job.model_copy(update={"suffix": "mine"})}, "job.suffix"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_names_the_field(change: dict[str, object], named: str) -> None:
    with pytest.raises(BadPlan, match=named):
        replace(PLAN, **change)  # type: ignore[arg-type]


def test_trials_of_a_classification_are_classifications() -> None:
    job = {**PLAN.job.model_dump(mode="json", exclude_unset=True)}
    method = {"type": "classification", "classification": {"hyperparameters": {"n_epochs": 3}}}
    plan = replace(PLAN, job=read_request({**job, "method": method}))
    spec = read_request(plan.request(study="study-1", number=0, peft="serial(4)", learning_rate=1e-3)).to_spec()
    assert (spec.kind, spec.epochs, spec.peft) == ("classification", 3, "serial(4)")


def test_a_job_the_api_would_refuse_is_refused_with_the_field_to_blame() -> None:
    job = {"model": "tiny", "training_file": "file-1", "validation_file": "file-2"}
    method = {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 2.0}}}
    plan = SearchPlan(name="find", space=PLAN.space, job=read_request({**job, "method": method}))
    with pytest.raises(BadPlan, match="learning_rate_multiplier"):
        plan.request(study="study-1", number=0, peft="serial(4)", learning_rate=1e-3)
