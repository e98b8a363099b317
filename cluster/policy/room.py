"""One pack while a round fills it: who still fits, and when somebody who does not would."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from polygraft.cluster.model import Job, JobId, Limits, Pack, PackId, Snapshot
from polygraft.cluster.policy.budget import Budget, bytes_of
from polygraft.cluster.policy.standing import Load

STALE_S = 60.0  # a pace that was measured so long ago says nothing any more


class Room:
    """`kept` is for a job that was overtaken long enough: nobody else goes in."""

    def __init__(self, pack: Pack, limits: Limits, load: Load, left_s: Mapping[JobId, float]) -> None:
        self.pack, self.load, self.kept = pack, load, False
        self.count = len(load.jobs)
        self.budget = Budget(limits, jobs=self.count, bytes=load.bytes)
        self._left_s = left_s
        self._promised: list[Job] = []
        self._ends: list[tuple[float, int]] | None = None

    @property
    def order(self) -> tuple[int, int, PackId]:
        """Punica's: most jobs first, then least memory left, then the id."""
        return -self.count, self.budget.bytes, self.pack.id

    def takes(self, job: Job) -> bool:
        return not self.kept and self.budget.refusal(job) is None

    def take(self, job: Job) -> None:
        self.budget.take(job)
        self.count += 1

    def wait_s(self, job: Job) -> float:
        """In how many seconds the job would fit, by the pace of those that are here; inf where that is not known."""
        jobs = self.budget.jobs - len(self._promised)
        free = self.budget.bytes - sum(bytes_of(one) for one in self._promised)
        for left_s, given in self._expected():
            jobs, free = jobs + 1, free + given
            if self.budget.holds(job, jobs, free):
                return left_s
        return inf

    def promise(self, job: Job) -> None:
        """Keep what the job needs of what those that end here give back, so that nobody else counts on it. What is
        free now is left to others."""
        self._promised.append(job)

    def lasts_s(self) -> float:
        """Until the last of its jobs (it has some) is expected to end; inf where that is not known of one."""
        return max(self._left_s.get(job, inf) for job in self.load.jobs)

    def _expected(self) -> list[tuple[float, int]]:
        """In how many seconds which bytes are given back, the next first."""
        if self._ends is None:
            here = self.pack.id
            going = {job.id for job in self.load.jobs.values() if job.stopping or job.moving_to not in (None, here)}
            left = {job: 0.0 if job in going else self._left_s[job] for job in {*going, *self._left_s}}
            self._ends = sorted((left[one.id], bytes_of(one)) for one in self.load.jobs.values() if one.id in left)
        return self._ends


def paces(snapshot: Snapshot, pack: PackId) -> Mapping[JobId, float]:
    """In how many seconds from now the pack's jobs are expected to end, as far as its worker has measured it lately."""
    pace = snapshot.paces.get(pack)
    if pace is None or snapshot.now - pace.at > STALE_S:
        return {}
    return {job: max(0.0, left_s - (snapshot.now - pace.at)) for job, left_s in pace.left_s.items()}
