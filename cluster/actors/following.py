"""The fleet as the control log tells it, event by event, and where its jobs stand."""

from __future__ import annotations

import logging
from dataclasses import replace

from polygraft.cluster import evolve
from polygraft.cluster.events import JobEvent
from polygraft.cluster.model import JobId, Snapshot
from polygraft.cluster.policy.standing import Standing
from polygraft.cluster.states import IllegalTransition
from polygraft.cluster.store.base import StoredEvent

LOG = logging.getLogger(__name__)


class Following:
    """From a snapshot on. `standing` is always that of the snapshot's jobs; to find it anew takes as long as there are
    jobs, and to follow an event does not."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.standing = Standing.of(snapshot.jobs.values())

    @property
    def unfinished(self) -> int:
        """Jobs that are not over."""
        return len(self.snapshot.jobs) - len(self.standing.over)

    def apply(self, stored: StoredEvent) -> None:
        """One that cannot have happened only moves the version on."""
        before = self.snapshot
        try:
            self.snapshot = evolve.apply(before, stored.id, stored.event)
        except IllegalTransition as error:
            LOG.error("event %s is ignored: %s", stored.id, error)
            self.snapshot = replace(before, version=stored.id)
            return
        if isinstance(stored.event, JobEvent):
            self._change(before, stored.event.job)
            if before.over and before.over[0] not in self.snapshot.jobs:
                self._change(before, before.over[0])

    def _change(self, before: Snapshot, job: JobId) -> None:
        self.standing.change(before.jobs.get(job), self.snapshot.jobs.get(job))
