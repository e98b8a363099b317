"""The bridge between Tune's questions and the study, without Ray."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from ray.tune.search import Searcher

from polygraft.tuning.driver import StudySearcher
from polygraft.tuning.space import Rates, Searched, Space, Term
from polygraft.tuning.study import Failure, Result, Study, Trial, TrialState
from tests.tuning.plans import plan_of
from tests.tuning.standin import SHAPE

PLAN = plan_of()
DONE = {"done": True, "loss": 2.0, "parameters": 100, "job": "ftjob-1", "model": "find-0@1", "loss_before": 3.0}


def bridge_of(study: Study | None = None, limit: int = 12, seen: list[Trial] | None = None) -> StudySearcher:
    study = study or Study(PLAN.space, PLAN.objectives, PLAN.sampler)
    return StudySearcher(
        study, replace(PLAN, trials=limit), (seen if seen is not None else []).append, lambda trial, share: None
    )


def test_what_tune_saw_is_told_to_the_study() -> None:
    seen: list[Trial] = []
    bridge = bridge_of(seen=seen)
    config = bridge.suggest("a")
    trial = bridge.study.trials[0]
    assert config == {"number": 0, "peft": trial.candidate.peft, "learning_rate": trial.candidate.learning_rate}
    bridge.on_trial_complete("a", DONE)
    assert bridge.study.trials[0].outcome == Result(
        values=(2.0, float(trial.candidate.parameters)), loss=2.0, job="ftjob-1", model="find-0@1", loss_before=3.0
    )
    assert [trial.state for trial in seen] == [TrialState.RUNNING, TrialState.COMPLETE]


@pytest.mark.parametrize(
    ("result", "error", "reason"),
    [
        (None, True, "the trial's process ended before its job"),
        ({"done": False, "progress": 0.5, "job": "ftjob-1"}, False, "the trial's process ended before its job"),
        ({"done": True, "failure": "the loss is nan", "job": "ftjob-1"}, False, "the loss is nan"),
        ({**DONE, "loss": float("nan")}, False, "loss is nan"),
        ({"done": True}, False, "loss is nan"),
    ],
)
def test_a_trial_without_a_number_never_stays_pending(
    result: dict[str, object] | None, error: bool, reason: str
) -> None:
    bridge = bridge_of()
    bridge.suggest("a")
    bridge.on_trial_complete("a", result, error=error)
    outcome = bridge.study.trials[0].outcome
    assert isinstance(outcome, Failure) and outcome.reason == reason


def test_after_a_restart_the_trials_that_were_running_come_first_and_the_rest_is_asked() -> None:
    before = Study(PLAN.space, PLAN.objectives, PLAN.sampler)
    for _ in range(3):
        before.ask()
    before.tell(1, Result(values=(2.0, 100.0)))
    bridge = bridge_of(Study(PLAN.space, PLAN.objectives, PLAN.sampler, trials=before.trials), limit=4)
    assert bridge.left == 3
    numbers = [config["number"] for name in "abc" if isinstance(config := bridge.suggest(name), dict)]
    assert numbers == [0, 2, 3]
    assert bridge.suggest("d") == Searcher.FINISHED
    bridge.on_trial_complete("b", DONE)
    assert bridge.study.trials[2].state is TrialState.COMPLETE


def test_a_tell_that_failed_is_not_told_again_as_a_failed_trial() -> None:
    def keep(trials: tuple[Trial, ...]) -> None:
        if trials[0].outcome is not None and broken:
            raise ConnectionError("the store is down")

    broken = True
    bridge = bridge_of(Study(PLAN.space, PLAN.objectives, PLAN.sampler, keep=keep))
    bridge.suggest("a")
    with pytest.raises(ConnectionError):
        bridge.on_trial_complete("a", DONE)
    broken = False
    with pytest.raises(ConnectionError):
        bridge.on_trial_complete("a", error=True)
    assert isinstance(bridge.error, ConnectionError)
    assert bridge.study.trials[0].state is TrialState.RUNNING


def test_a_search_is_finished_when_all_is_told_or_the_space_is_used_up() -> None:
    bridge = bridge_of(limit=2)
    assert not bridge.finished
    for name in "ab":
        bridge.suggest(name)
        assert not bridge.finished
    bridge.on_trial_complete("a", DONE)
    bridge.on_trial_complete("b", error=True)
    assert bridge.finished

    term = Term("lora", "lora", (Searched("r", (1,)),))
    space = Space(SHAPE, (term,), Rates(1.0e-3, 1.01e-3))  # lora(1) at two digits of one rate
    bridge = bridge_of(Study(space, PLAN.objectives, replace(PLAN, space=space).sampler))
    bridge.suggest("a")
    bridge.on_trial_complete("a", DONE)
    assert bridge.suggest("b") == Searcher.FINISHED and bridge.finished


def test_nothing_of_the_study_goes_into_the_files_that_tune_writes() -> None:
    assert pickle.loads(pickle.dumps(bridge_of())).__dict__ == {}
