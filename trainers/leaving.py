"""How a job leaves its pack for another one: between two of its steps, with all that decides its future on disk before
anybody is told.

A crash before the event leaves it here, where the next worker goes on from its last checkpoint and lets it leave again;
a crash after it leaves it to the other pack, whatever this one's manifest says.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from polygraft.cluster.advance import advance_job
from polygraft.cluster.events import JobLeft
from polygraft.cluster.folders import Folders
from polygraft.cluster.model import JobId, PackId
from polygraft.cluster.states import IllegalTransition
from polygraft.cluster.store.base import Fence, Store
from polygraft.trainers import checkpoint, faults, handover
from polygraft.trainers.blame import Seen
from polygraft.trainers.running import RunningJob

_LOG = logging.getLogger(__name__)
AGAIN_S = 5.0  # until a job that could not be saved tries again


@dataclass(slots=True)
class Leaving:
    """The jobs of a pack that were told to leave it."""

    pack: PackId
    store: Store
    fence: Fence
    folders: Folders
    device_class: str
    jobs: set[JobId] = field(default_factory=set)
    _again_at: float = float("-inf")

    def due(self, running: Mapping[str, RunningJob], outside: Collection[JobId]) -> list[JobId]:
        """Who can leave now: those whose global batch has not begun, and those that are not in a step at all. A job
        that has no step left is published here."""
        if not self.jobs or time.monotonic() < self._again_at:
            return []
        between = {job for job, one in running.items() if not one.micro and not one.finished}
        return sorted(job for job in self.jobs if job in between or job in outside)

    def leave(self, job: JobId, running: RunningJob | None, named: str | None, seen: Seen | None) -> bool:
        """Whether the job, which is `running` or as its checkpoint of this name has it, is no more this pack's. Not
        where it cannot be saved, for which it stays until it can, and where it ends or is stopped here."""
        folder = self.folders.job(job)
        try:
            if running is not None and running.step:
                named = checkpoint.save(folder, running, named, device_class=self.device_class)
            handover.write(folder, seen)
        except OSError as error:
            _LOG.warning("%s stays in %s, it cannot be saved: %s", job, self.pack, error)
            self._again_at = time.monotonic() + AGAIN_S
            return False
        faults.point("before_leaving")
        step = checkpoint.step_of(named) if running is None else running.step
        self.jobs.discard(job)
        try:
            advance_job(self.store, JobLeft(job=job, pack=self.pack, step=step, at=time.time()), fence=self.fence)
        except IllegalTransition:
            return False
        faults.point("after_leaving")
        return True
