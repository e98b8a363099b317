"""The bridge between Tune's questions and the study, without Ray."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest
from pydantic import JsonValue
from ray.tune.search import Searcher
from ray.tune.utils import flatten_dict

from polygraft.cluster.answers import JobEvent, RemoteJob
from polygraft.cluster.scores import Scores
from polygraft.cluster.service import ServiceNotRunning
from polygraft.tuning.ahead import LEASE_S, LOOK_S, Ahead
from polygraft.tuning.bridge import StudyScheduler, StudySearcher
from polygraft.tuning.objectives import Limit
from polygraft.tuning.space import Rates, Searched, Space, Term
from polygraft.tuning.study import Failure, Result, Stopped, Study, Trial, TrialState
from tests.tuning.bridged import bridged
from tests.tuning.plans import plan_of
from tests.tuning.standin import SHAPE

PLAN = plan_of()
DONE = {"done": True, "loss": 2.0, "parameters": 100, "job": "ftjob-1", "model": "find-0@1", "loss_before": 3.0}


def bridge_of(
    study: Study | None = None, limit: int = 12, seen: list[Trial] | None = None, at_once: int = 4
) -> StudySearcher:
    study = study or Study(PLAN.space, PLAN.objectives, PLAN.sampler)
    plan, on_trial = replace(PLAN, trials=limit, concurrency=at_once), (seen if seen is not None else []).append
    return bridged(study, plan, on_trial)


def test_what_tune_saw_is_told_to_the_study() -> None:
    seen: list[Trial] = []
    bridge = bridge_of(seen=seen, at_once=1)
    config = bridge.suggest("a")
    trial = bridge.study.trials[0]
    what = trial.candidate
    body = PLAN.request(study="study-1", number=0, peft=what.peft, learning_rate=what.learning_rate)
    assert config == {"number": 0, "body": body}
    bridge.on_trial_complete("a", DONE)
    assert bridge.study.trials[0].outcome == Result(
        values=(2.0, float(trial.candidate.parameters)), loss=2.0, job="ftjob-1", model="find-0@1", loss_before=3.0
    )
    assert [trial.state for trial in seen] == [TrialState.RUNNING, TrialState.COMPLETE]


def test_jobs_are_begun_as_soon_as_the_record_has_their_trials_as_many_as_may_run_at_once() -> None:
    told: list[tuple[int, object]] = []
    kept: list[int] = []
    study = Study(PLAN.space, PLAN.objectives, PLAN.sampler, keep=lambda trials: kept.append(len(trials)))

    def begin(number: int, body: Mapping[str, JsonValue]) -> str:
        assert kept[-1] == number + 1
        told.append((number, body))
        return f"ftjob-{number}"

    bridge = bridged(study, replace(PLAN, trials=6, concurrency=4), begin=begin)
    configs = [bridge.suggest("a")]
    assert [number for number, _ in told] == [0, 1, 2, 3]
    configs += [bridge.suggest(name) for name in "bcd"]
    assert [{"number": number, "body": body} for number, body in told] == configs
    assert bridge.suggest("e") is None, "Tune is to ask again"
    bridge.on_trial_complete("c", DONE)
    assert bridge.suggest("e") == {"number": 4, "body": told[4][1]} and len(told) == 5


class Driven:
    """A driver's side of a search of three trials at once, by a clock of its own: the `begun` jobs, and those that are
    `over`."""

    def __init__(self) -> None:
        self.now, self.begun, self.over = 0.0, list[int](), set[str]()
        plan, on_trial = replace(PLAN, trials=6, concurrency=3), list[Trial]().append
        study = Study(PLAN.space, PLAN.objectives, PLAN.sampler)
        ahead = Ahead("study-1", study, plan, on_trial, self._begin, lambda: set(self.over), lambda: self.now)
        self.bridge = StudySearcher(ahead, plan, on_trial)

    def _begin(self, number: int, body: Mapping[str, JsonValue]) -> str:
        self.begun.append(number)
        return f"ftjob-{number}"

    def taken(self, name: str) -> object:
        config = self.bridge.suggest(name)
        assert isinstance(config, dict)
        return config["number"]


def test_the_lease_of_a_job_is_renewed_until_an_actor_takes_it_over() -> None:
    driven = Driven()
    driven.taken("a")
    for at, expected in ((0.3, []), (0.4, [1, 2]), (0.6, []), (0.8, [1, 2])):
        driven.begun.clear()
        driven.now = at * LEASE_S
        assert driven.bridge.goes_on("a", {"progress": 0.1})
        assert driven.begun == expected


def test_an_actor_goes_to_the_trial_whose_job_is_over_and_comes_back() -> None:
    driven = Driven()
    bridge, study = driven.bridge, driven.bridge.study
    assert driven.taken("a") == 0
    driven.over.add("ftjob-2")
    assert bridge.goes_on("a", {"progress": 0.1}), "it looks every other second"
    driven.now = LOOK_S
    driven.begun.clear()
    assert not bridge.goes_on("a", {"progress": 0.1}) and driven.begun == [0], "whose lease the driver has again"
    bridge.on_trial_complete("a", {"done": True, "progress": 0.1})  # as Tune tells what its scheduler stopped
    assert study.trials[0].state is TrialState.RUNNING
    assert driven.taken("b") == 2
    bridge.on_trial_complete("b", {**DONE, "job": "ftjob-2"})
    assert study.trials[2].state is TrialState.COMPLETE
    assert [driven.taken(name) for name in "cde"] == [1, 0, 3], "in the order in which they were begun or put back"


def test_scores_are_told_beside_the_loss() -> None:
    bridge = bridge_of()
    bridge.suggest("a")
    scores = [["exact_match", 0.25], ["accuracy", 0.5], ["of a newer service", 1.0]]
    bridge.on_trial_complete("a", flatten_dict({**DONE, "scores": scores}))  # as Tune's controller tells it
    assert bridge.study.trials[0].scores == Scores(exact_match=0.25, accuracy=0.5)


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
    assert bridge.ahead.left == 3
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


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        (Limit("bytes", 3.0), r"96 proposals \d+ miss one; the nearest: .* with \d+ bytes, not 3"),
        (Limit("loss", 0.5), r"none of 2 results is within 0\.5 loss; the nearest miss is trial 0, .* with 2 loss"),
    ],
    ids=["known", "measured"],
)
def test_a_search_whose_limit_nobody_meets_ends_early_and_names_the_nearest_miss(limit: Limit, says: str) -> None:
    study = Study(PLAN.space, PLAN.objectives, PLAN.sampler, limits=(limit,), hope=2)
    bridge = bridge_of(study, at_once=1)
    for name in "ab":
        if bridge.suggest(name) != Searcher.FINISHED:
            bridge.on_trial_complete(name, DONE)
    assert bridge.suggest("c") == Searcher.FINISHED and bridge.finished
    assert bridge.ahead.ended is not None and re.search(says, bridge.ahead.ended)


def test_nothing_of_the_study_goes_into_the_files_that_tune_writes() -> None:
    assert pickle.loads(pickle.dumps(bridge_of())).__dict__ == {}


class Training:
    """A service whose jobs are `at` a step of nine, each with one loss all the way."""

    def __init__(self, *losses: float) -> None:
        self.losses, self.at, self.cancelled = losses, 1, list[str]()

    def job(self, job: str) -> RemoteJob:
        status = "running" if self.at < 9 else "succeeded"
        return RemoteJob(id=job, status=status, model="m", created_at=0, step=self.at, steps_total=9)

    def events(self, job: str) -> list[JobEvent]:
        loss = self.losses[int(job.partition("-")[2])]
        said = {"created_at": 0, "level": "info", "message": "", "type": "metrics"}
        return [
            JobEvent.model_validate({"id": f"{job}-{step}", **said, "data": {"step": step, "loss": loss}})
            for step in range(self.at, 0, -1)
        ]

    def cancel(self, job: str) -> None:
        self.cancelled.append(job)


def watched_bridge(service: Training, seen: list[Trial] | None = None) -> StudySearcher:
    """Of a search by halving of five trials, four at once, whose first one has an actor."""
    plan = replace(PLAN, pruner="halving", minimise=("loss",), trials=5, concurrency=4)
    study = Study(plan.space, plan.objectives, plan.sampler)
    bridge = bridged(study, plan, ([] if seen is None else seen).append, jobs=service)
    bridge.suggest("a")
    return bridge


def decided(bridge: StudySearcher, progress: float) -> str:
    """What Tune is told to do with the actor of the first trial."""
    trial = SimpleNamespace(trial_id="a")
    return StudyScheduler(bridge).on_trial_result(None, trial, {"progress": progress, "job": "ftjob-0"})  # type: ignore[arg-type]


def test_one_actor_speaks_for_all_trials_and_those_behind_the_others_are_stopped_and_told() -> None:
    seen: list[Trial] = []
    service = Training(0.5, 2.0, 3.0, 0.6, 9.0)
    bridge = watched_bridge(service, seen)
    assert decided(bridge, 0.1) == "CONTINUE"
    outcome = bridge.study.trials[2].outcome
    assert isinstance(outcome, Stopped)
    assert (outcome.step, outcome.steps_total, outcome.loss, outcome.job) == (1, 9, 3.0, "ftjob-2")
    assert bridge.study.trials[2] in seen and service.cancelled == ["ftjob-1", "ftjob-2", "ftjob-3"]
    assert [trial.number for trial in bridge.study.trials if trial.state is TrialState.RUNNING] == [0, 4], "another one"


def test_an_actor_leaves_its_own_trial_when_that_is_stopped() -> None:
    service = Training(3.0, 2.0, 1.0, 0.5, 9.0)
    bridge = watched_bridge(service)
    service.at = 0
    assert decided(bridge, 0.0) == "CONTINUE"
    service.at = 3
    assert decided(bridge, 0.4) == "STOP" and "ftjob-0" not in service.cancelled, "it is when the study knows"
    bridge.on_trial_complete("a", {"progress": 0.4, "job": "ftjob-0", "done": True})
    assert isinstance(bridge.study.trials[0].outcome, Stopped) and "ftjob-0" in service.cancelled


def test_a_service_that_does_not_answer_stops_nobody() -> None:
    class Silent(Training):
        def job(self, job: str) -> RemoteJob:
            raise ServiceNotRunning("down")

    bridge = watched_bridge(Silent(1.0, 2.0, 3.0, 0.5, 9.0))
    assert decided(bridge, 0.1) == "CONTINUE"
    bridge.on_trial_complete("a", {**DONE, "job": "ftjob-0"})
    outcome = bridge.study.trials[0].outcome
    assert isinstance(outcome, Result) and not outcome.curve


def test_a_trial_that_ends_keeps_its_curve_in_the_record() -> None:
    service = Training(2.0, 2.0, 2.0, 2.0, 9.0)
    bridge = watched_bridge(service)
    service.at = 3
    assert decided(bridge, 0.3) == "CONTINUE"
    service.at = 9
    bridge.on_trial_complete("a", {**DONE, "job": "ftjob-0"})
    outcome = bridge.study.trials[0].outcome
    assert isinstance(outcome, Result) and outcome.curve == (2.0, 2.0, 2.0)


def test_a_driver_that_needs_neither_optuna_nor_scipy_asks_for_its_first_trial_without_them() -> None:
    """Nor Tune: each is seconds of a core while no job trains."""
    program = (
        "import sys\n"
        "import polygraft.tuning.driver\n"
        "from tests.tuning.plans import plan_of\n"
        "plan = plan_of(model='lhs')\n"
        "assert plan.sampler.propose([], 0)\n"
        "print([name for name in ('optuna', 'scipy', 'torch', 'ray') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
