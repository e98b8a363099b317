"""How a job comes into a pack: from its record and files to its place in the runner, or to the reason why not."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from polygraft.cluster.folders import Folders
from polygraft.cluster.model import Job, JobError, TenantId
from polygraft.cluster.publish import UnknownModel, resolve
from polygraft.cluster.store.base import Store
from polygraft.grafts.formats import native
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.runtime.process import allocation_failed
from polygraft.grafts.sources import Source
from polygraft.grafts.spec import SpecError
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers import checkpoint, rungs
from polygraft.trainers.failure import shared
from polygraft.trainers.job import TrainJob
from polygraft.trainers.memory import TooLarge
from polygraft.trainers.prepare import FileGone, prepare
from polygraft.trainers.readings import Readings
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.running import RunningJob

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Joining:
    """`micro_rows` fixes the split of the jobs' global batches."""

    runner: PackRunner
    tokeniser: Tokeniser
    store: Store
    folders: Folders
    backbone_files: BackboneFiles
    micro_rows: int
    readings: Readings = field(default_factory=Readings)

    def join(self, record: Job, name: str | None) -> RunningJob | JobError:
        """The job in the pack, from its checkpoint of this name or from its start, and its loss before training; or
        what of its own keeps it out. Raises what is not its own: of store and device."""
        peft, param = record.spec.peft, f"method.{record.spec.kind}.hyperparameters.peft"
        self.readings.forget_but(running.job for running in self.runner.jobs.values())
        try:
            trained = prepare(
                record,
                files=self.folders.files,
                tokeniser=self.tokeniser,
                backbone_files=self.backbone_files,
                micro_rows=self.micro_rows,
                longest=self.runner.memory.longest,
                readings=self.readings,
            )
            running = self._joined(self.runner.memory.fitted(trained), name, record)
            if running.before is None:
                before = self.runner.untrained(record.id)
                if before is not None and not before.finite:
                    raise SpecError(f"{peft!r} has a held-out loss of {before.loss} before its first step")
                running.before = before
        except SpecError as error:
            return JobError("invalid_value", f"{param}: {error}", param)
        except TooLarge as error:
            return JobError("out_of_memory", str(error), "training_file")
        except FileGone as error:
            return JobError("invalid_training_data", str(error), error.param)
        except rungs.RungGone as error:
            return JobError("rung_gone", str(error), "rung.after")
        except (ValueError, OSError) as error:
            return JobError("invalid_training_data", str(error), "training_file")
        except Exception as error:  # whatever its graft or its samples lead to is the job's own
            if shared(error):
                raise
            if allocation_failed(error):
                return JobError("out_of_memory", f"{peft!r} does not fit together with the pack's other jobs")
            _LOG.exception("job %s could not start", record.id)
            return JobError("cannot_start", f"{param}: {peft!r} cannot start: {type(error).__name__}: {error}", param)
        return running

    def _joined(self, job: TrainJob, name: str | None, record: Job) -> RunningJob:
        rung, tenant = record.spec.rung, record.tenant
        if name is None and rung is not None and rung.after is not None:
            return self.runner.restore(rungs.go_on(self.folders, job, rung.after, self.runner.backbone.device))
        if name is None:
            return self.runner.admit(job, {source: self._source(tenant, source) for source in job.graft.spec.sources})
        try:
            saved = checkpoint.load(self.folders.job(job.id), name, job, self.runner.backbone.device)
        except checkpoint.CheckpointError as error:
            older = checkpoint.before(self.folders.job(job.id), name)
            _LOG.warning("%s cannot be read, the job goes on from %s: %s", job.id, older or "its start", error)
            return self._joined(job, older, record)
        return self.runner.restore(saved)

    def _source(self, tenant: TenantId, name: str) -> Source:
        """A graft that a job is made over. Raises SpecError if the tenant has none of that name that can be read."""
        backbone = self.runner.backbone
        try:
            graft = resolve(self.store, tenant, name)
        except UnknownModel as error:
            raise SpecError(f"of: {error}") from None
        try:
            stored = native.load(self.folders.grafts / graft.id, shape=backbone.shape, backbone=backbone.fingerprint)
        except FormatError as error:
            raise SpecError(f"of: {name!r} cannot be read: {error}") from None
        return Source(stored.graft, stored.tensors)
