"""Where the jobs stand: in whose queue, in which pack, over. What a round of decisions looks up in place of going
through all of them.

Made of a snapshot in one pass, and kept up with it job by job afterwards, which comes to the same.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from polygraft.cluster.model import Job, JobId, PackId, TenantId
from polygraft.cluster.policy.admission import turn
from polygraft.cluster.policy.budget import bytes_of
from polygraft.cluster.states import Reason

# Of a job that a round does not come to: it stays with what it was told when one did.
STILL_TRUE = frozenset({Reason.TURN, Reason.PACK_FULL, Reason.PACK_MEMORY})


class Kind(NamedTuple):
    """Packs that are alike for a job: of one backbone, over as many devices."""

    backbone: str
    devices: int


@dataclass(slots=True)
class Load:
    """A pack's jobs, with those that are on their way to it from another, and the bytes of their state."""

    jobs: dict[JobId, Job] = field(default_factory=dict)
    bytes: int = 0


@dataclass(slots=True)
class Standing:
    """`queues` has the waiting jobs of every tenant in their turn; `arriving` those among them that left a pack for
    another, `restless` those whose reason may not be true any more. `active` are a tenant's jobs in packs, `entered`
    when they came in, the last one last; `at_risk` the unfinished ones that were asked to stop or have an owner, `over`
    those that the snapshot still remembers."""

    queues: dict[Kind, dict[TenantId, list[Job]]] = field(default_factory=dict)
    arriving: dict[JobId, Job] = field(default_factory=dict)
    restless: dict[JobId, Job] = field(default_factory=dict)
    loads: dict[PackId, Load] = field(default_factory=dict)
    active: dict[TenantId, dict[JobId, Job]] = field(default_factory=lambda: defaultdict(dict))
    entered: dict[TenantId, list[tuple[float, JobId]]] = field(default_factory=dict)
    at_risk: dict[JobId, Job] = field(default_factory=dict)
    over: dict[JobId, Job] = field(default_factory=dict)

    @staticmethod
    def of(jobs: Iterable[Job]) -> Standing:
        standing = Standing()
        for job in jobs:
            standing.change(None, job)
        return standing

    def change(self, before: Job | None, after: Job | None) -> None:
        """The job was `before` and is `after`; None where the snapshot does not have it."""
        if before is not None:
            self._remove(before)
        if after is not None:
            self._add(after)

    def load(self, pack: PackId) -> Load:
        return self.loads.get(pack) or Load()

    def count(self, pack: PackId) -> int:
        """How many jobs the pack has, or is to have."""
        load = self.loads.get(pack)
        return 0 if load is None else len(load.jobs)

    def _add(self, job: Job) -> None:
        if job.final:
            self.over[job.id] = job
            return
        if job.cancel_requested or job.lease_until is not None:
            self.at_risk[job.id] = job
        if job.pack is None:
            insort(self.queues.setdefault(kind_of(job), {}).setdefault(job.tenant, []), job, key=turn)
            if job.moving_to is not None:
                self.arriving[job.id] = job
            if job.reason not in STILL_TRUE:
                self.restless[job.id] = job
        else:
            self.active[job.tenant][job.id] = job
            insort(self.entered.setdefault(job.tenant, []), _entry(job))
        for pack in _places(job):
            load = self.loads.setdefault(pack, Load())
            load.jobs[job.id] = job
            load.bytes += bytes_of(job)

    def _remove(self, job: Job) -> None:
        for named in (self.over, self.at_risk, self.arriving, self.restless):
            named.pop(job.id, None)
        if job.final:
            return
        if job.pack is None:
            queues = self.queues[kind_of(job)]
            queue = queues[job.tenant]
            del queue[bisect_left(queue, turn(job), key=turn)]
            if not queue:
                del queues[job.tenant]
            if not queues:
                del self.queues[kind_of(job)]
        else:
            del self.active[job.tenant][job.id]
            entered = self.entered[job.tenant]
            del entered[bisect_left(entered, _entry(job))]
            if not entered:
                del self.active[job.tenant], self.entered[job.tenant]
        for pack in _places(job):
            load = self.loads[pack]
            del load.jobs[job.id]
            load.bytes -= bytes_of(job)
            if not load.jobs:
                del self.loads[pack]


def kind_of(job: Job) -> Kind:
    return Kind(job.spec.backbone, job.spec.devices)


def _entry(job: Job) -> tuple[float, JobId]:
    return job.admitted_at or 0.0, job.id


def _places(job: Job) -> frozenset[PackId]:
    """Where room is kept for the job: in its pack, and in the one that it moves to."""
    return frozenset(pack for pack in (job.pack, job.moving_to) if pack is not None)
