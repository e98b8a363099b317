"""Which running trials the pruner stops. The driver reads how far their jobs are, and the losses of those that have
come to another look; no trial needs a process of its own for that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from polygraft.cluster.answers import JobEvent, RemoteJob
from polygraft.cluster.client import ApiFailure
from polygraft.cluster.service import ServiceNotRunning
from polygraft.tuning.ahead import LOOK_S
from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.pruners.watch import Watch
from polygraft.tuning.study import Stopped, Trial

_ASKS_A_S = 8.0  # of all trials, at most: each costs the service's processes some milliseconds


class Jobs(Protocol):
    """What is asked of the service, as `cluster/client.py:Client` has it."""

    def job(self, job: str) -> RemoteJob: ...

    def events(self, job: str) -> Iterable[JobEvent]: ...

    def cancel(self, job: str) -> object: ...


class Stops:
    """Of one driver. What the service does not answer now is asked again at the next look."""

    def __init__(self, watch: Watch, plan: SearchPlan, jobs: Jobs, clock: Callable[[], float] = time.monotonic) -> None:
        self._watch, self._plan, self._jobs, self._clock = watch, plan, jobs, clock
        self._read: dict[str, int] = {}  # the last step of a job whose loss is known
        self._looked_at = float("-inf")

    def look(self, trials: Sequence[Trial], jobs: Mapping[int, str]) -> Mapping[int, Stopped]:
        """Those to be stopped now of the running trials, whose jobs are given by number."""
        if self._clock() - self._looked_at < max(LOOK_S, len(jobs) / _ASKS_A_S):
            return {}
        self._looked_at = self._clock()
        due: dict[int, RemoteJob] = {}
        for number, id in jobs.items():
            with suppress(ApiFailure, ServiceNotRunning):
                job = self._jobs.job(id)
                if not job.final and self._seen(trials[number], job):
                    due[number] = job
        judged = {number: self._watch.judge(trials[number], job.steps_total or 0) for number, job in due.items()}
        return {number: replace(one, job=due[number].id) for number, one in judged.items() if one is not None}

    def curve(self, trial: Trial, id: str) -> tuple[float, ...]:
        """Of a trial whose job has ended, with its last losses."""
        with suppress(ApiFailure, ServiceNotRunning):
            self._seen(trial, self._jobs.job(id))
        return self._watch.curve(trial.number)

    def told(self, trial: Trial) -> None:
        """The study has what came of the trial; the job of one that was stopped is cancelled."""
        self._watch.ended(trial)
        if isinstance(trial.outcome, Stopped) and trial.outcome.job is not None:
            with suppress(ApiFailure, ServiceNotRunning):  # then its lease runs out
                self._jobs.cancel(trial.outcome.job)

    def _seen(self, trial: Trial, job: RemoteJob) -> bool:
        """Whether it has come to another look; its losses are then read."""
        total = job.steps_total
        if not total or not self._watch.due(trial.number, job.step, total):
            return False
        self._watch.see(trial, self._plan.known(trial.candidate.peft), self._losses(job.id), total)
        return True

    def _losses(self, job: str) -> Mapping[int, float]:
        """By step, those that are new."""
        known, found = self._read.get(job, 0), dict[int, float]()
        for event in self._jobs.events(job):  # newest first
            data = event.data or {}
            step, loss = data.get("step"), data.get("loss")
            if event.type == "metrics" and isinstance(step, int) and isinstance(loss, float):
                if step <= known:
                    break
                found[step] = loss
        self._read[job] = max(found, default=known)
        return found
