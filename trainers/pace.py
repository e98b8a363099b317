"""How long the jobs of a pack take for an optimiser step, beside those that they ride with now, and what is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from polygraft.trainers.running import RunningJob

NEWEST = 0.2  # share of the last step in the average


class Paces:
    """An average that forgets, since the company changes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, float] = {}
        self._step_s: dict[str, float] = {}

    def began(self, job: str) -> None:
        self._last[job] = self._clock()

    def stepped(self, job: str) -> None:
        now = self._clock()
        took = now - self._last.get(job, now)
        before = self._step_s.get(job, took)
        self._last[job], self._step_s[job] = now, before + NEWEST * (took - before)

    def ended(self, job: str) -> None:
        self._last.pop(job, None)
        self._step_s.pop(job, None)

    def left_s(self, running: Mapping[str, RunningJob]) -> dict[str, float]:
        """Seconds until each is expected to have no step left, of those that have taken one here."""
        return {
            job: self._step_s[job] * (one.job.last_step - one.step)
            for job, one in running.items()
            if job in self._step_s
        }

    def ending(self, running: Mapping[str, RunningJob], within_s: float) -> frozenset[str]:
        """Those that have steps left, and are expected to have none in so many seconds."""
        return frozenset(job for job, left_s in self.left_s(running).items() if 0 < left_s < within_s)
