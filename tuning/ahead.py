"""The trials of a search whose jobs are begun before an actor speaks for them.

As many jobs as the plan allows train at once, from the first moment on, whatever Ray Tune's actors take to start and
however few of them there are. Until an actor takes a job over, the driver renews its lease.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from pydantic import JsonValue

from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.study import Exhausted, NotYet, Study, Trial, TrialState

LEASE_S = 120.0  # of a job that nobody has taken over yet, at least
OnTrial = Callable[[Trial], None]
Begin = Callable[[int, Mapping[str, JsonValue]], None]


class Ahead:
    """Of one driver. Raises what the study's record raises."""

    def __init__(
        self,
        name: str,
        study: Study,
        plan: SearchPlan,
        on_trial: OnTrial,
        begin: Begin,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` is the study's. `begin` submits a trial's job, or renews the lease of one that is submitted."""
        self.study = study
        self.ended: str | None = None  # why nothing more is asked
        self.limit = plan.trials
        self._name, self._plan, self._on_trial, self._begin, self._clock = name, plan, on_trial, begin, clock
        self._again = deque(trial for trial in study.trials if trial.state is TrialState.RUNNING)
        self._waiting: deque[tuple[Trial, Mapping[str, JsonValue]]] = deque()
        self._renewed_at = clock()

    @property
    def left(self) -> int:
        """Trials still to be taken."""
        return len(self._again) + len(self._waiting) + max(0, self.limit - len(self.study.trials))

    def fill(self) -> None:
        """Begin the jobs of the trials that an earlier driver left, then ask for as many more as may run at once."""
        while self._again:
            self._put(self._again.popleft())
        running = sum(trial.state is TrialState.RUNNING for trial in self.study.trials)
        try:
            for _ in range(min(self._plan.concurrency - running, self.limit - len(self.study.trials))):
                self._put(self.study.ask())
        except NotYet:
            pass  # asked again when the next trial has been told
        except Exhausted as error:
            self.ended = str(error)
            self.limit = len(self.study.trials)

    def take(self) -> tuple[Trial, Mapping[str, JsonValue]] | None:
        """The trial whose job was begun first, and the job's body. Who takes it renews its lease."""
        return self._waiting.popleft() if self._waiting else None

    def renew(self) -> None:
        """The leases of jobs that nobody has taken, when a third of them is over."""
        if self._clock() - self._renewed_at > LEASE_S / 3:
            self._renewed_at = self._clock()
            for trial, body in self._waiting:
                self._begin(trial.number, body)

    def _put(self, trial: Trial) -> None:
        self._on_trial(trial)
        body = self._plan.request(
            study=self._name,
            number=trial.number,
            peft=trial.candidate.peft,
            learning_rate=trial.candidate.learning_rate,
            rung=self._plan.rung(trial, self.study.trials),
        )
        self._begin(trial.number, body)
        self._waiting.append((trial, body))
