"""The study's record in the store."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from dataclasses import asdict, replace

import pytest

from polygraft.cluster.model import StudyId, TenantId
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Conflict
from polygraft.cluster.store.memory import MemoryStore
from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.record import BadRecord, StudyRecord, decode, encode, open_study
from polygraft.tuning.samplers.choose import SamplerName
from polygraft.tuning.spaces.s4 import s4_space
from polygraft.tuning.study import Failure, NotYet, Result, Study, as_seen
from tests.tuning.plans import invented, plan_of
from tests.tuning.standin import SHAPE

STUDY, EVE = StudyId("study-1"), TenantId("eve")


def opened(store: MemoryStore, plan: SearchPlan, *, tenant: TenantId = EVE) -> Study:
    return open_study(store, STUDY, plan, tenant=tenant, clock=lambda: 7.0)


def test_a_study_survives_the_driver_with_every_ask_and_tell() -> None:
    store = MemoryStore()
    first = opened(store, plan_of())
    for _ in range(4):
        first.ask()
    first.tell(1, Result(values=(2.5, 300.0), job="ftjob-1", model="find-1@1", loss_before=3.0))
    first.tell(0, Failure(reason="diverged", job="ftjob-0"))
    again = opened(store, plan_of())
    assert again.trials == first.trials
    assert again.ask() == first_ask_of(first)


def first_ask_of(study: Study) -> object:
    """What this study would ask next, without keeping it."""
    return Study(study.space, study.objectives, plan_of().sampler, trials=study.trials).ask()


@pytest.mark.parametrize(
    ("model", "trials"),
    [("random", 200), ("lhs", 200), ("nsga2", 64), ("noah", 64), ("pbt", 64), ("staged", 70), ("tpe", 40)],
)
def test_drivers_that_die_anywhere_lose_no_trial_and_find_what_one_that_lives_finds(
    model: SamplerName, trials: int
) -> None:
    """Each driver opens the record, takes over what runs, and dies after some asks and tells; the undisturbed one tells
    the trials in another order. TPE is the one whose proposals depend on it: each is made again of what it had seen."""
    space = s4_space(SHAPE, most=20_000) if model == "staged" else None
    plan = replace(plan_of(trials, space=space, model="lhs", seed=4), model=model, startup=8)
    store, chance, running = MemoryStore(), random.Random(7), list[int]()
    while len((study := opened(store, plan)).trials) < trials or running:
        assert [trial.number for trial in study.trials if trial.outcome is None] == sorted(running)
        for _ in range(chance.randrange(1, 12)):
            with suppress(NotYet):
                while len(running) < 8 and len(study.trials) < trials:
                    running.append(study.ask().number)
            if running:
                number = running.pop(chance.randrange(len(running)))
                study.tell(number, invented(plan.space, study.trials[number]))
    found = opened(store, plan).trials
    assert len(found) == trials and all(trial.values for trial in found)
    for trial in found:
        assert plan.sampler.propose(as_seen(found, trial.number), trial.attempt) == trial.config
    if model != "tpe":
        alone = Study(plan.space, plan.objectives, plan.sampler, part=plan.part)
        while len(alone.trials) < trials:
            trial = alone.ask()
            alone.tell(trial.number, invented(plan.space, trial))
        assert [(one.config, one.parent) for one in alone.trials] == [(one.config, one.parent) for one in found]
        assert [one.number for one in alone.front] == [one.number for one in opened(store, plan).front]


def test_the_record_names_study_tenant_and_times() -> None:
    store = MemoryStore()
    opened(store, plan_of()).ask()
    found = store.get(keys.study(STUDY))
    assert found is not None
    assert (found.value.tenant, found.value.name, found.value.updated_at) == (EVE, "find", 7.0)
    assert decode(found.value.body).plan == plan_of()


def test_of_two_drivers_of_one_study_the_second_to_write_is_refused() -> None:
    store = MemoryStore()
    one, other = opened(store, plan_of()), opened(store, plan_of())
    one.ask()
    with pytest.raises(Conflict):
        other.ask()
    assert other.trials == ()
    assert len(opened(store, plan_of()).trials) == 1


def test_a_study_goes_on_only_with_its_own_plan_and_tenant() -> None:
    store = MemoryStore()
    opened(store, plan_of()).ask()
    with pytest.raises(BadRecord, match="begun with another plan"):
        opened(store, replace(plan_of(), seed=1))
    with pytest.raises(BadRecord, match="not one of mallory's"):
        opened(store, plan_of(), tenant=TenantId("mallory"))


@pytest.mark.parametrize("text", ['{"trials": []}', "no json", '{"plan": {}, "schema_version": 4}'])
def test_a_body_that_is_no_record_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadRecord, match="study: "):
        decode(text)


def test_a_study_of_the_first_schema_goes_on() -> None:
    """Its spaces were methods with one size each, the largest halved again and again."""
    old = {
        "plan": {
            "name": "find",
            "space": {
                "shape": asdict(SHAPE),
                "methods": [{"method": "serial", "largest": 4}, {"method": "prefix", "largest": 2}],
                "groups": [[0, 2], [3, 5]],
                "learning_rate": [1e-4, 1e-2],
            },
            "job": {"model": "tiny", "training_file": "file-1", "validation_file": "file-2"},
        },
        "trials": [],
        "schema_version": 1,
    }
    space = decode(json.dumps(old)).plan.space
    assert [(one.name, one.high) for one in space.parameters] == [
        ("serial", 3),
        ("prefix", 2),
        ("layers_0_2", 1),
        ("layers_3_5", 1),
        ("learning_rate", 1e-2),
    ]
    config = {"serial": 1, "prefix": 2, "layers_0_2": 1, "layers_3_5": 0, "learning_rate": 1e-3}
    assert space.candidate(config).peft == "serial(2)@0-2"


def test_a_study_of_the_second_schema_goes_on_with_what_its_suggestions_had_seen() -> None:
    """It had for each trial the numbers of all that had been told, which a long search's record consisted of."""
    store = MemoryStore()
    study = opened(store, plan_of())
    for _ in range(3):
        study.ask()
    study.tell(1, invented(plan_of().space, study.trials[1]))
    study.ask()
    found = store.get(keys.study(STUDY))
    assert found is not None
    old = json.loads(found.value.body)
    for trial, seen in zip(old["trials"], ([], [], [], [1]), strict=True):
        del trial["unseen"]
        trial["seen"] = seen
    record = decode(json.dumps(old | {"schema_version": 2}))
    assert record.trials == study.trials
    assert [trial.unseen for trial in record.trials] == [(), (0,), (0, 1), (0, 2)]
    assert [trial.seen for trial in record.trials] == [(), (), (), (1,)]


def test_a_record_grows_with_the_number_of_its_trials() -> None:
    def bytes_of(trials: int) -> int:
        plan = plan_of(trials, model="random")
        study = Study(plan.space, plan.objectives, plan.sampler)
        for _ in range(trials):
            study.tell(study.ask().number, Failure(reason="lost"))
        return len(encode(StudyRecord(plan=plan, trials=study.trials)))

    assert bytes_of(400) < 2.1 * bytes_of(200)
