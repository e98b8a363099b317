"""Which jobs a pack's killed workers are blamed on. Pure.

A process that is killed says nothing, so what was underway tells which of its jobs did it. From the second death in the
same step on, a job is a suspect: it stays out while the others go on, and is let in alone until it is past that step.
Who was alone when the worker died once more is guilty, and the others were only beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

SUSPECT_FROM = 2  # deaths in a step, from which on a job rides alone


@dataclass(frozen=True, slots=True)
class Seen:
    """A job that was underway in `deaths`, the last time in optimiser step `step`."""

    deaths: int
    step: int


@dataclass(frozen=True, slots=True)
class Blame:
    """`deaths` of the pack's workers, and the jobs that are not past the step in which the last of theirs died."""

    deaths: int = 0
    seen: Mapping[str, Seen] = field(default_factory=dict)

    def after_death(self, underway: Mapping[str, int]) -> tuple[Blame, str | None]:
        """With one death more, in which these jobs were at these steps; or with nobody to blame, and the job that it
        proves guilty."""
        deaths = {job: (self.seen[job].deaths if job in self.seen else 0) + 1 for job in underway}
        blame = Blame(self.deaths + 1, {**self.seen, **{job: Seen(deaths[job], underway[job]) for job in underway}})
        alone = next(iter(underway)) if len(underway) == 1 else None
        if alone is None or deaths[alone] < SUSPECT_FROM:
            return blame, None
        return Blame(), alone

    def at(self, steps: Mapping[str, int]) -> Blame:
        """After these jobs got to these steps: who is past the step of its last death is no more blamed."""
        past = [job for job, seen in self.seen.items() if job in steps and steps[job] > seen.step]
        return self if not past else replace(self, seen={k: v for k, v in self.seen.items() if k not in past})

    def taking(self, job: str, seen: Seen | None) -> Blame:
        """After the job came from another pack, in which this was seen of it."""
        return self if seen is None else replace(self, seen={**self.seen, job: seen})

    def without(self, job: str) -> Blame:
        """After the job ended."""
        return replace(self, seen={one: seen for one, seen in self.seen.items() if one != job})

    def suspects(self) -> tuple[str, ...]:
        """Who has to ride alone, the least suspected first."""
        alone = ((seen.deaths, job) for job, seen in self.seen.items() if seen.deaths >= SUSPECT_FROM)
        return tuple(job for _, job in sorted(alone))

    def rows(self, most: int) -> int:
        """How many rows a forward may have at `most`: half as many after every death, since memory may have been short
        for all of them together."""
        return max(1, most >> self.deaths)
