"""Ray Tune's side of a driver: it asks the study which trial an actor is to speak for, and tells it what it saw.

Tune's own state is of no use afterwards: the record in the store is the state.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from polygraft.cluster.scores import UNSCORED, Scores
from polygraft.tuning.ahead import Ahead, Begun, OnTrial
from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.stops import Stops
from polygraft.tuning.study import Failure, Outcome, Result, Stopped, Study, Trial, TrialState


class StudySearcher(Searcher):
    """Answers Tune's questions from the study, and tells the study what Tune saw."""

    def __init__(self, ahead: Ahead, plan: SearchPlan, on_trial: OnTrial, stops: Stops | None = None) -> None:
        """`stops` where a pruner may stop trials."""
        super().__init__()
        self.study: Study = ahead.study
        self.error: Exception | None = None
        self.ahead, self._plan, self._on_trial = ahead, plan, on_trial
        self._taken: dict[str, Begun] = {}
        self._stops = stops
        self._stopped: dict[int, Stopped] = {}  # whose actor has not left it yet

    @property
    def told(self) -> int:
        return sum(trial.state is not TrialState.RUNNING for trial in self.study.trials)

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to ask and nothing to wait for."""
        return self.told == len(self.study.trials) >= self.ahead.limit

    def suggest(self, trial_id: str) -> dict[str, object] | str | None:  # type: ignore[override]  # FINISHED is a str
        with self._kept():
            self.ahead.fill()
        taken = self.ahead.take()
        if taken is None:
            return None if self.ahead.left else Searcher.FINISHED  # None: Tune asks again
        self._taken[trial_id] = taken
        return {"number": taken.trial.number, "body": taken.body}

    def goes_on(self, trial_id: str, result: Mapping[str, object]) -> bool:
        """Whether the actor of a trial that goes on stays with it: not where the pruner stops it, nor while the job of
        another one is over that no actor speaks for. Trials without an actor that the pruner stops are told at once."""
        self.ahead.renew()
        own = self._taken[trial_id].trial.number
        if (job := result.get("job")) is not None:
            self.ahead.jobs[own] = str(job)
        if self._stops is not None:
            with self._kept():
                self._stop(own, self._stops)
        if own in self._stopped:
            return False
        moves = self.ahead.one_is_over()
        if moves:
            self.ahead.put_back(self._taken.pop(trial_id))
        return not moves

    def on_trial_complete(self, trial_id: str, result: Mapping[str, object] | None = None, error: bool = False) -> None:
        if trial_id not in self._taken:  # it was put back, and is told when an actor comes to it again
            return
        number = self._taken[trial_id].trial.number
        if self.study.trials[number].state is not TrialState.RUNNING:
            return
        if self.error is not None:  # Tune tells a trial again, as failed, when telling it went wrong
            raise self.error
        with self._kept():
            self._tell(number, self._outcome(number, None if error else result))

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """What goes wrong ends the search, whatever Tune makes of it."""
        try:
            yield
        except Exception as error:
            self.error = error
            raise

    def _stop(self, own: int, stops: Stops) -> None:
        """What the pruner stops now, but for the trial `own`, whose actor has to leave it first; others are begun in
        their place."""
        for number, stopped in stops.look(self.study.trials, self.ahead.jobs).items():
            if number == own:
                self._stopped[number] = stopped
            else:
                self._tell(number, stopped)
                self.ahead.fill()

    def _tell(self, number: int, outcome: Outcome) -> None:
        trial = self.study.tell(number, outcome)
        self.ahead.forget(number)
        if self._stops is not None:
            self._stops.told(trial)
        self._on_trial(trial)

    def _outcome(self, number: int, result: Mapping[str, object] | None) -> Outcome:
        if number in self._stopped and result is not None:
            return self._stopped.pop(number)
        trial = self.study.trials[number]
        outcome = _outcome(self._plan, trial, result)
        if isinstance(outcome, Result) and outcome.job is not None and self._stops is not None:
            return replace(outcome, curve=self._stops.curve(trial, outcome.job))
        return outcome

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the record in the store is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as above."""

    def __getstate__(self) -> dict[str, object]:
        """Nothing, as above: Tune pickles its searcher, and ours holds a connection."""
        return {}


class StudyScheduler(FIFOScheduler):
    """Stops a trial when the study's pruner says so; what is started next is the searcher's."""

    def __init__(self, bridge: StudySearcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bridge = bridge

    def on_trial_result(self, tune_controller: object, trial: tune.experiment.Trial, result: dict[str, object]) -> str:
        goes_on = self._bridge.goes_on(trial.trial_id, result)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP


def _outcome(plan: SearchPlan, trial: Trial, result: Mapping[str, object] | None) -> Result | Failure:
    """What the last report of a trial says; no report: its actor died."""

    def text(field: str) -> str | None:
        value = (result or {}).get(field)
        return None if value is None else str(value)

    def number(field: str) -> float:
        return float(text(field) or "nan")

    if result is None or not result.get("done"):
        return Failure(reason="the trial's process ended before its job", job=text("job"))
    if reason := text("failure"):
        return Failure(reason=reason, job=text("job"))
    before = number("loss_before") if text("loss_before") else None
    told = result.get("scores")  # pairs: what is a mapping Tune takes apart before it tells the searcher
    scores = Scores.of(dict(told)) if isinstance(told, list) else UNSCORED
    values = plan.values(trial.candidate.peft, number("loss"), scores)
    return Result(
        values=values, loss=number("loss"), job=text("job"), model=text("model"), loss_before=before, scores=scores
    )


@contextmanager
def _environment() -> Iterator[None]:
    """What Tune and Ray read from the environment, as it was again afterwards; and their loggers only for errors."""
    wanted = {
        "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints even when verbose is 0
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    before = {name: os.environ.get(name) for name in wanted}
    levels = {name: logging.getLogger(name).level for name in ("ray", "ray.tune")}
    os.environ.update(wanted)
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@_environment()
def fit(trainable: type[tune.Trainable], bridge: StudySearcher, folder: Path, *, at_once: int) -> None:
    """Have the study's trials run by actors, `at_once` of them. Raises what telling the study raised."""
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=bridge,
            scheduler=StudyScheduler(bridge),
            num_samples=-1,  # until the searcher says so: a trial that is put back is one more of Tune's
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"trial-{trial.config['number']}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=f"driver-{_unused(folder)}",  # a name used again would overwrite the earlier driver's files
            storage_path=str(folder.absolute()),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    try:
        tuner.fit()
    except TuneError:
        if bridge.error is not None:
            raise bridge.error from None
        raise
    if bridge.error is not None:
        raise bridge.error


def _unused(folder: Path) -> int:
    return sum(1 for _ in folder.glob("driver-*"))
