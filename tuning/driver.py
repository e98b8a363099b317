"""Runs a search: Ray Tune starts the trials and sees them end, our study decides what they are.

Tune's own state is of no use afterwards. A driver that is started again reads the study's record, hands the trials that
were running to new actors first, which take over their jobs, and asks for the rest.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pydantic import JsonValue
from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from polygraft.cluster.client import ApiFailure, Client
from polygraft.cluster.ids import new_study_id
from polygraft.cluster.model import StudyId, TenantId
from polygraft.cluster.scores import UNSCORED, Scores
from polygraft.cluster.service import ServiceNotRunning
from polygraft.cluster.store.base import Store
from polygraft.tuning.owned import submitted
from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.pruners.choose import pruner
from polygraft.tuning.pruners.watch import Watch
from polygraft.tuning.record import open_study
from polygraft.tuning.study import Exhausted, Failure, NotYet, Outcome, Result, Stopped, Study, Trial, TrialState
from polygraft.tuning.trial import CALL_S, Access, Terms, trials_of

STARTS_S = 120.0  # for which a job waits at least until the actor that speaks for it has started
OnTrial = Callable[[Trial], None]


@dataclass(frozen=True, slots=True)
class StudyResult:
    """All trials in the order they were asked in, and those of the front from the smallest graft up; why the search
    ended before all were run, if it did."""

    id: StudyId
    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    ended: str | None = None


class Interrupted(Exception):
    """The search was stopped from outside; the same call with the same study goes on with it."""


def search(  # noqa: PLR0913
    plan: SearchPlan,
    *,
    store: Store,
    access: Access,
    tenant: TenantId,
    folder: Path,
    study: StudyId | None = None,
    on_trial: OnTrial = lambda trial: None,
    clock: Callable[[], float] = time.time,
) -> StudyResult:
    """Run the plan's trials to their end, or the rest of them when `study` was begun before.

    This process must be connected to Ray, where the trials' actors live. Tune's files go to folder/<study>. `on_trial`
    sees every trial when it is asked and when it is told. Raises Interrupted after SIGINT, BadRecord for a study of
    another plan, and what the store raises.
    """
    name = study or new_study_id()
    opened = open_study(store, name, plan, tenant=tenant, clock=clock)
    terms = Terms(name, plan.lease_s, losses=plan.pruner != "none", at_once=plan.concurrency)
    with Client(access.url, access.key, timeout_s=CALL_S) as client:
        bridge = StudySearcher(name, opened, plan, on_trial, begin=partial(_begin, client, terms))
        if bridge.left:
            with _environment():
                _fit(trials_of(name, access, terms), bridge, plan, folder / name)
    return StudyResult(name, bridge.study.trials, bridge.study.front, bridge.ended)


class StudySearcher(Searcher):
    """Answers Tune's questions from the study, and tells the study what Tune saw."""

    def __init__(
        self,
        name: str,
        study: Study,
        plan: SearchPlan,
        on_trial: OnTrial,
        *,
        begin: Callable[[int, Mapping[str, JsonValue]], None] = lambda number, body: None,
    ) -> None:
        """`name` is the study's. `begin` submits a trial's job ahead of its actor, which takes it over."""
        super().__init__()
        self._name = name
        self.study = study
        self.error: Exception | None = None
        self.ended: str | None = None  # why nothing more is asked
        self._plan = plan
        self._limit = plan.trials
        self._on_trial = on_trial
        self._begin = begin
        self._again = deque(trial for trial in study.trials if trial.state is TrialState.RUNNING)
        self._numbers: dict[str, int] = {}
        self._stopped: dict[int, Stopped] = {}
        judge = pruner(plan.pruner)
        known = {trial.candidate.peft: plan.known(trial.candidate.peft) for trial in study.trials}
        self._watch = None if judge is None else Watch(judge, study.trials, known)

    @property
    def left(self) -> int:
        """Trials still to be run."""
        return len(self._again) + max(0, self._limit - len(self.study.trials))

    @property
    def told(self) -> int:
        return sum(trial.state is not TrialState.RUNNING for trial in self.study.trials)

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to ask and nothing to wait for."""
        return self.told == len(self.study.trials) >= self._limit

    def suggest(self, trial_id: str) -> dict[str, object] | str | None:  # type: ignore[override]  # FINISHED is a str
        try:
            trial = self._next()
        except NotYet:
            return None  # Tune asks again
        except Exhausted as error:
            self.ended = str(error)
            self._limit = len(self.study.trials)
            trial = None
        except Exception as error:
            self.error = error
            raise
        if trial is None:
            return Searcher.FINISHED
        self._numbers[trial_id] = trial.number
        self._on_trial(trial)
        body = self._plan.request(
            study=self._name,
            number=trial.number,
            peft=trial.candidate.peft,
            learning_rate=trial.candidate.learning_rate,
            rung=self._plan.rung(trial, self.study.trials),
        )
        self._begin(trial.number, body)
        return {"number": trial.number, "body": body}

    def goes_on(self, trial_id: str, result: Mapping[str, object]) -> bool:
        """Whether a trial that reported its losses is to be trained on."""
        number = self._numbers[trial_id]
        stopped = self._judged(number, result)
        if stopped is None:
            return True
        job = result.get("job")
        self._stopped[number] = replace(stopped, job=None if job is None else str(job))
        return False

    def on_trial_complete(self, trial_id: str, result: Mapping[str, object] | None = None, error: bool = False) -> None:
        number = self._numbers[trial_id]
        if self.study.trials[number].state is not TrialState.RUNNING:
            return
        if self.error is not None:  # Tune tells a trial again, as failed, when telling it went wrong
            raise self.error
        try:
            trial = self.study.tell(number, self._outcome(number, None if error else result))
        except Exception as failed:
            self.error = failed
            raise
        if self._watch is not None:
            self._watch.ended(trial)
        self._on_trial(trial)

    def _judged(self, number: int, result: Mapping[str, object]) -> Stopped | None:
        """What the pruner says to the losses of a report, pairs of step and loss."""
        losses, total = result.get("losses"), result.get("steps_total")
        if self._watch is None or not isinstance(losses, list) or not isinstance(total, int):
            return None
        trial = self.study.trials[number]
        by_step = {int(step): float(loss) for step, loss in losses}
        return self._watch.judge(trial, self._plan.known(trial.candidate.peft), by_step, total)

    def _outcome(self, number: int, result: Mapping[str, object] | None) -> Outcome:
        if number in self._stopped and result is not None:
            return self._stopped[number]
        if self._watch is not None and result is not None:
            self._judged(number, result)  # of the last report only the losses count
        outcome = _outcome(self._plan, self.study.trials[number], result)
        if isinstance(outcome, Result) and self._watch is not None:
            return replace(outcome, curve=self._watch.curve(number))
        return outcome

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the record in the store is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as above."""

    def __getstate__(self) -> dict[str, object]:
        """Nothing, as above: Tune pickles its searcher, and ours holds a connection."""
        return {}

    def _next(self) -> Trial | None:
        if self._again:
            return self._again.popleft()
        return self.study.ask() if len(self.study.trials) < self._limit else None


class StudyScheduler(FIFOScheduler):
    """Stops a trial when the study's pruner says so; what is started next is the searcher's."""

    def __init__(self, bridge: StudySearcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bridge = bridge

    def on_trial_result(self, tune_controller: object, trial: tune.experiment.Trial, result: dict[str, object]) -> str:
        goes_on = self._bridge.goes_on(trial.trial_id, result)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP


def _begin(client: Client, terms: Terms, number: int, body: Mapping[str, JsonValue]) -> None:
    """Submit the job of a trial, which trains while its actor's process starts. What goes wrong the actor meets again,
    and says."""
    lease_s = max(terms.lease_s, STARTS_S)
    with suppress(ApiFailure, ServiceNotRunning):
        submitted(client, body, study=terms.study, name=str(number), lease_s=lease_s)


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


def _fit(trainable: type[tune.Trainable], bridge: StudySearcher, plan: SearchPlan, folder: Path) -> None:
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=bridge,
            scheduler=StudyScheduler(bridge),
            num_samples=bridge.left,
            max_concurrent_trials=plan.concurrency,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"trial-{trial.config['number']}",
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
    if not bridge.finished:
        raise Interrupted(f"the search was stopped after {bridge.told} of {plan.trials} trials; run it again to go on")


def _unused(folder: Path) -> int:
    return sum(1 for _ in folder.glob("driver-*"))


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
