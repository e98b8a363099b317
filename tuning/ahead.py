"""The trials of a search whose jobs are begun before an actor speaks for them.

As many jobs as the plan allows train at once, from the first moment on, whatever Ray Tune's actors take to start and
however few of them there are. Until an actor takes a job over, and after it has put it back, the driver renews its
lease.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.study import Exhausted, NotYet, Study, Trial, TrialState

LEASE_S = 120.0  # of a job that nobody has taken over yet, at least
LOOK_S = 2.0  # between two looks at how jobs are, at least
OnTrial = Callable[[Trial], None]
Begin = Callable[[int, Mapping[str, JsonValue]], str | None]
Over = Callable[[], Collection[str]]


@dataclass(frozen=True, slots=True)
class Begun:
    """A trial, the body of its job, and the job's id, if it could be submitted."""

    trial: Trial
    body: Mapping[str, JsonValue]
    job: str | None


class Ahead:
    """Of one driver. Raises what the study's record raises."""

    def __init__(  # noqa: PLR0913
        self,
        name: str,
        study: Study,
        plan: SearchPlan,
        on_trial: OnTrial,
        begin: Begin,
        over: Over = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` is the study's. `begin` submits a trial's job, or renews the lease of one that is submitted, and gives
        its id; `over` gives the ids of the newest jobs that have ended."""
        self.study = study
        self.ended: str | None = None  # why nothing more is asked
        self.jobs: dict[int, str] = {}  # of the trials that run, by number, where they are known
        self.limit = plan.trials
        self._name, self._plan, self._on_trial, self._clock = name, plan, on_trial, clock
        self._begin, self._over = begin, over
        self._again = deque(trial for trial in study.trials if trial.state is TrialState.RUNNING)
        self._waiting: deque[Begun] = deque()
        self._seen: Collection[str] = ()  # jobs that were over at the last look
        self._renewed_at = self._looked_at = clock()

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

    def take(self) -> Begun | None:
        """The trial whose job is over, as far as was seen, else the one whose job was begun first. Who takes it renews
        its lease."""
        if not self._waiting:
            return None
        taken = next((one for one in self._waiting if one.job in self._seen), self._waiting[0])
        self._waiting.remove(taken)
        return taken

    def put_back(self, taken: Begun) -> None:
        """Its actor goes to another trial, and the driver renews its lease again."""
        self._wait(taken.trial, taken.body)

    def forget(self, number: int) -> None:
        """The trial has been told."""
        self.jobs.pop(number, None)
        self._waiting = deque(one for one in self._waiting if one.trial.number != number)

    def one_is_over(self) -> bool:
        """Whether the job of a trial that nobody has taken has ended, as far as was seen a moment ago."""
        if self._waiting and self._clock() - self._looked_at >= LOOK_S:
            self._looked_at, self._seen = self._clock(), self._over()
        return any(one.job in self._seen for one in self._waiting)

    def renew(self) -> None:
        """The leases of jobs that nobody has taken, when a third of them is over."""
        if self._clock() - self._renewed_at > LEASE_S / 3:
            self._renewed_at = self._clock()
            for one in self._waiting:
                self._begin(one.trial.number, one.body)

    def _put(self, trial: Trial) -> None:
        self._on_trial(trial)
        body = self._plan.request(
            study=self._name,
            number=trial.number,
            peft=trial.candidate.peft,
            learning_rate=trial.candidate.learning_rate,
            rung=self._plan.rung(trial, self.study.trials),
        )
        self._wait(trial, body)

    def _wait(self, trial: Trial, body: Mapping[str, JsonValue]) -> None:
        job = self._begin(trial.number, body)
        self._waiting.append(Begun(trial, body, job))
        if job is not None:
            self.jobs[trial.number] = job
