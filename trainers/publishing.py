"""How a job that has no step left becomes a graft: judged, written, published once."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import NoReturn

from polygraft.cluster.folders import Folders
from polygraft.cluster.model import GraftId, JobError, JobId
from polygraft.cluster.publish import publish
from polygraft.cluster.store.base import Fence, Store
from polygraft.grafts.formats import native
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.kernels.common.room import is_full
from polygraft.trainers import faults, rungs
from polygraft.trainers.evaluate import Judgement
from polygraft.trainers.failure import failure
from polygraft.trainers.reports import Reports
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.running import RunningJob

_LOG = logging.getLogger(__name__)
ROOM_S = 5.0  # until a write is tried again that found no room on the disk


class NoRoom(Exception):
    """The disk has no room for the graft; the job stays, and all of it is tried again later."""


@dataclass(slots=True)
class Publishing:
    """For the jobs of one pack. What validation and test file say of a job that waits for room is computed once."""

    runner: PackRunner
    store: Store
    fence: Fence
    folders: Folders
    reports: Reports
    device_class: str
    _judged: dict[JobId, tuple[Judgement | None, Judgement | None]] = field(default_factory=dict)
    _told: set[JobId] = field(default_factory=set)  # that they wait for room
    _not_before: float = float("-inf")

    def publish(self, job: JobId, running: RunningJob) -> JobError | None:
        """The job under its name, or what of its own prevents it. Raises NoRoom, IllegalTransition where it ended
        otherwise meanwhile, and what is no job's."""
        if time.monotonic() < self._not_before:
            self._wait(job)
        doing = f"{running.at}, evaluation"
        try:
            if job not in self._judged:
                after, tested = self.runner.held_out(job), self.runner.tested(job)
                for name, found in (("held-out", after), ("test", tested)):
                    if found is not None and not found.finite:
                        return JobError("non_finite_loss", f"{doing}: the {name} loss is {found.loss}")
                self._judged[job] = after, tested
            doing = "its graft cannot be saved"
            faults.point("before_publish")
            identity, saved_bytes = self._write(running)
            if running.job.config.until < 1 and running.step:
                rungs.keep(self.folders, running, device_class=self.device_class)
        except Exception as error:
            if is_full(error):
                _LOG.warning("%s has no room for the graft of %s: %s", self.folders.grafts, job, error)
                self._not_before = time.monotonic() + ROOM_S
                self._wait(job)
            failed = failure(job, doing, error, "step_failed" if job not in self._judged else "graft_not_saved")
            return JobError(failed.code, failed.message)
        after, tested = self._judged[job]
        self.reports.progress(running, after, tested)
        graft = publish(
            self.store,
            job,
            graft=identity,
            method=running.job.graft.spec.method,
            backbone_fingerprint=self.runner.backbone.fingerprint,
            parameters=running.job.graft.parameters,
            context_length=running.job.graft.context_length,
            bytes=saved_bytes,
            at=time.time(),
            fence=self.fence,
        )
        self.reports.note(job, f"published {graft.model}", held_out=after, tested=tested)
        return None

    def forget(self, job: JobId) -> None:
        """After the job left the pack."""
        self._judged.pop(job, None)
        self._told.discard(job)

    def _write(self, running: RunningJob) -> tuple[GraftId, int]:
        backbone = self.runner.backbone
        identity = native.save(
            self.folders.grafts,
            running.job.graft,
            running.slab.tensors,
            backbone=backbone.fingerprint,
            backbone_files=BackboneFiles(backbone.folder),
        )
        return GraftId(identity), native.size(self.folders.grafts / identity)

    def _wait(self, job: JobId) -> NoReturn:
        if job not in self._told:
            self._told.add(job)
            message = "no room for the graft on the service's disk; it is kept until there is"
            self.reports.note(job, message, level="warn")
        raise NoRoom
