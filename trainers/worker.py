"""The pack's worker: reads commands at step boundaries, steps the runner, and writes down what happened. Knows no Ray.

All it needs after a crash lies in the pack's manifest, the jobs' checkpoints and the store. Nothing that happens to
one job leaves the loop; only the loss of the store, the disk or the process does.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from torch import AcceleratorError

from polygraft.cluster.advance import advance_job, advance_pack, record_progress
from polygraft.cluster.events import JobCancelled, JobDeviceClassChanged, JobFailed, JobStarted, PackOpened
from polygraft.cluster.model import GraftId, Job, JobError, JobId, PackId, TenantId
from polygraft.cluster.publish import UnknownModel, publish, resolve
from polygraft.cluster.states import IllegalTransition
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import EntryId, Store, StoreError
from polygraft.grafts.formats import native
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.runtime.process import allocation_failed
from polygraft.grafts.sources import Source
from polygraft.grafts.spec import SpecError
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.kernels.common.room import is_full
from polygraft.kernels.dense.device_class import device_class
from polygraft.trainers import checkpoint, faults
from polygraft.trainers.job import TrainJob
from polygraft.trainers.manifest import Manifest
from polygraft.trainers.prepare import prepare
from polygraft.trainers.runner import PackRunner, RunningJob, Stepped
from polygraft.trainers.steplog import StepLog

_LOG = logging.getLogger(__name__)
CHECKPOINT_S = 30.0
PROGRESS_S = 1.0
IDLE_S = 0.5
ROOM_S = 5.0  # until a write is tried again that found no room on the disk
METRICS_KEPT = 100_000
PEFT = "method.supervised.hyperparameters.peft"


@dataclass(frozen=True, slots=True)
class Folders:
    """Where the worker reads and writes, under the data folder."""

    data: Path

    @property
    def files(self) -> Path:
        return self.data / "files"

    @property
    def grafts(self) -> Path:
        return self.data / "grafts"

    def job(self, job: str) -> Path:
        return self.data / "jobs" / job

    def pack(self, pack: str) -> Path:
        return self.data / "packs" / pack


class PackWorker:
    """One incarnation of a pack's worker; a newer one fences it out of the store."""

    def __init__(
        self, pack: PackId, runner: PackRunner, tokeniser: Tokeniser, store: Store, *, folders: Folders, micro_rows: int
    ) -> None:
        self.pack, self.runner, self.tokeniser, self.store = pack, runner, tokeniser, store
        self.folders, self.micro_rows = folders, micro_rows
        self.stock = BackboneFiles(runner.backbone.folder)
        lease = store.acquire(keys.pack_scope(pack), f"worker of {pack}", 60.0, steal=True)
        assert lease is not None, "a stolen lease is always granted"
        self.fence = lease.fence
        self.device_class = str(device_class(runner.backbone.device))
        self._log = StepLog(folders.pack(pack), str(runner.backbone.device))
        self._saved = self._progressed = time.monotonic()
        self._publish_at = float("-inf")  # not before: the last time there was no room
        self._waiting: set[JobId] = set()  # jobs that are told that they wait for room
        self._losses: dict[JobId, float | None] = {}  # what finished jobs lose on held-out data

    def run(self, heartbeat: Callable[[], None]) -> None:
        """Serve the command stream until it says close and no job is left; `heartbeat` is called at every step
        boundary."""
        manifest = Manifest.load(self.folders.pack(self.pack))
        self._cursor, self._closing = EntryId(manifest.cursor), manifest.closing
        self._named: Mapping[str, str | None] = manifest.jobs
        self.runner.steps = manifest.step
        advance_pack(self.store, PackOpened(pack=self.pack, at=time.time()), fence=self.fence)
        for job, name in manifest.jobs.items():
            self._admit(JobId(job), name)
        while not (self._closing and not self.runner.jobs):
            self._obey(wait_s=0.0 if self._training else IDLE_S)
            if self.runner.jobs:
                self._step()
            heartbeat()
        self._log.close()

    @property
    def _training(self) -> bool:
        """Whether a job has steps left; the others wait for room on the disk."""
        return any(not active.finished for active in self.runner.jobs.values())

    def _obey(self, wait_s: float) -> None:
        entries = self.store.read(keys.commands(self.pack), self._cursor, wait_s=wait_s)
        for entry_id, entry in entries:
            job = JobId(str(entry.get("job")))
            match entry["op"]:
                case "admit":
                    self._admit(job, checkpoint.newest(self.folders.job(job)))
                case "cancel":
                    self._cancel(job)
                case "close":
                    self._closing = True
            self._cursor = entry_id
        if entries:
            self._save(self.runner.jobs)

    def _admit(self, job: JobId, name: str | None) -> None:
        """Take a job in, from its checkpoint if it has one, or fail it with the line or field to blame."""
        if job in self.runner.jobs:
            return
        found = self.store.get(keys.job(job))
        if found is None or found.value.final:
            self._drop(job)  # which a crash may have prevented
            return
        active = self._active(found.value, name)
        if isinstance(active, JobError):
            self._fail(job, active)
            return
        trained = active.job
        started = JobStarted(
            job=job,
            pack=self.pack,
            parameters=trained.graft.parameters,
            steps_total=trained.steps_total,
            device_class=self.device_class,
            at=time.time(),
        )
        try:
            advance_job(self.store, started, fence=self.fence)
            self._compare_class(job, name)
        except IllegalTransition:  # cancelled or failed while its data was read
            self._drop(job)
            return
        self._note(
            job,
            f"training {trained.graft.spec.method}: {trained.steps_total} steps in {self.pack}",
            held_out_loss=active.loss_before,
        )
        self._progress(active)

    def _compare_class(self, job: JobId, name: str | None) -> None:
        """Say so where the checkpoint that the job goes on from is of another class of device than this one."""
        before = None if name is None else checkpoint.class_of(self.folders.job(job), name)
        if before is not None and before != self.device_class:
            changed = JobDeviceClassChanged(
                job=job, pack=self.pack, before=before, after=self.device_class, at=time.time()
            )
            advance_job(self.store, changed, fence=self.fence)
            promise = "bits are the same within a class alone, from here on numbers are equal to a tolerance"
            self._note(job, f"goes on on {self.device_class}; its steps so far are of {before}: {promise}")

    def _active(self, record: Job, name: str | None) -> RunningJob | JobError:
        """The job in the pack, or what of its own keeps it out. Raises what is not its own: of store and device."""
        peft = record.spec.peft
        try:
            trained = prepare(
                record,
                files=self.folders.files,
                tokeniser=self.tokeniser,
                stock=self.stock,
                micro_rows=self.micro_rows,
            )
            active = self._activate(trained, name, record.tenant)
            if active.loss_before is None and trained.held_out:
                active.loss_before = self.runner.evaluate(record.id, trained.held_out)
                if not isfinite(active.loss_before):
                    raise SpecError(f"{peft!r} has a held-out loss of {active.loss_before} before its first step")
        except (StoreError, AcceleratorError):
            raise
        except SpecError as error:
            return JobError("invalid_value", f"{PEFT}: {error}", PEFT)
        except (ValueError, OSError) as error:
            return JobError("invalid_training_data", str(error), "training_file")
        except Exception as error:  # whatever its graft or its samples lead to is the job's own
            if allocation_failed(error):
                return JobError("out_of_memory", f"{peft!r} does not fit together with the pack's other jobs")
            _LOG.exception("job %s of %s could not start", record.id, self.pack)
            return JobError("cannot_start", f"{PEFT}: {peft!r} cannot start: {type(error).__name__}: {error}", PEFT)
        return active

    def _activate(self, job: TrainJob, name: str | None, tenant: TenantId) -> RunningJob:
        if name is None:
            return self.runner.admit(job, {source: self._source(tenant, source) for source in job.graft.spec.sources})
        backbone = self.runner.backbone
        return self.runner.restore(checkpoint.load(self.folders.job(job.id), name, job, backbone.device))

    def _source(self, tenant: TenantId, name: str) -> Source:
        """A graft that a job is made over. Raises SpecError if the tenant has none of that name that can be read."""
        backbone = self.runner.backbone
        try:
            graft = resolve(self.store, tenant, name, backbone="")
        except UnknownModel as error:
            raise SpecError(f"of: {error}") from None
        assert graft is not None, "no graft has the empty name"
        try:
            stored = native.load(self.folders.grafts / graft.id, shape=backbone.shape, backbone=backbone.fingerprint)
        except FormatError as error:
            raise SpecError(f"of: {name!r} cannot be read: {error}") from None
        return Source(stored.graft, stored.tensors)

    def _cancel(self, job: JobId) -> None:
        if job in self.runner.jobs:
            with suppress(IllegalTransition):  # it ended by itself just before
                advance_job(self.store, JobCancelled(job=job, at=time.time()), fence=self.fence)
            self._drop(job)

    def _step(self) -> None:
        if self._training:
            self._forward()
        for job, active in list(self.runner.jobs.items()):
            if active.finished and time.monotonic() >= self._publish_at:
                self._publish(JobId(job), active)
            elif active.finished:
                self._wait_for_room(JobId(job))
        now = time.monotonic()
        if now - self._progressed > PROGRESS_S:
            self._progressed = now
            for active in self.runner.jobs.values():
                self._progress(active)
        if now - self._saved > CHECKPOINT_S:
            self._save(self.runner.jobs)

    def _forward(self) -> None:
        before = dict(self.runner.jobs)
        done = self.runner.step()
        self._log.write(done, {job: active.job.graft.spec.method for job, active in before.items()})
        for stepped in done.stepped:
            self._metrics(stepped)
        for failed in done.failed:
            self._fail(JobId(failed.job), JobError(failed.code, failed.message))

    def _publish(self, job: JobId, active: RunningJob) -> None:
        """Evaluate, write the graft, publish it once, and leave the pack; where there is no room for the graft, the job
        stays, and all of it is tried again later."""
        held_out = active.job.held_out
        if job not in self._losses:
            self._losses[job] = self.runner.evaluate(job, held_out) if held_out else None
        after = self._losses[job]
        backbone = self.runner.backbone
        faults.point("before_publish")
        try:
            identity = native.save(
                self.folders.grafts,
                active.job.graft,
                active.slab.tensors,
                backbone=backbone.fingerprint,
                stock=BackboneFiles(backbone.folder),
            )
        except (FormatError, OSError) as error:  # not finite: this job's loss alone
            if is_full(error):
                _LOG.warning("%s has no room for the graft of %s: %s", self.folders.grafts, job, error)
                self._publish_at = time.monotonic() + ROOM_S
                self._wait_for_room(job)
                return
            self._fail(job, JobError("graft_not_saved", str(error)))
            return
        record_progress(
            self.store,
            job,
            step=active.step,
            trained_tokens=active.tokens,
            loss_before=active.loss_before,
            loss_after=after,
            fence=self.fence,
        )
        try:
            graft = publish(
                self.store,
                job,
                graft=GraftId(identity),
                method=active.job.graft.spec.method,
                backbone_fingerprint=backbone.fingerprint,
                parameters=active.job.graft.parameters,
                context_length=active.job.graft.context_length,
                bytes=native.size(self.folders.grafts / identity),
                at=time.time(),
                fence=self.fence,
            )
        except IllegalTransition:  # cancelled at the last moment
            self._drop(job)
            return
        self._note(job, f"published {graft.model}", held_out_loss=after)
        self._drop(job)
        self._save(self.runner.jobs)

    def _wait_for_room(self, job: JobId) -> None:
        if job not in self._waiting:
            self._waiting.add(job)
            self._note(job, "no room for the graft on the service's disk; it is kept until there is", level="warn")

    def _drop(self, job: str) -> None:
        """Leave the pack; what a job saved for its restart is of no more use once the store knows its end."""
        self._losses.pop(JobId(job), None)
        self._waiting.discard(JobId(job))
        if job in self.runner.jobs:
            self.runner.remove(job)
        shutil.rmtree(self.folders.job(job), ignore_errors=True)

    def _fail(self, job: JobId, error: JobError) -> None:
        with suppress(IllegalTransition):
            advance_job(self.store, JobFailed(job=job, error=error, at=time.time()), fence=self.fence)
            self._note(job, error.message, level="error")
        self._drop(job)

    def _save(self, jobs: Mapping[str, RunningJob]) -> None:
        """Checkpoint every job at its last step boundary, then the manifest that names them all. Where there is no room
        for that, the last manifest and what it names stay as they are, and it is tried again soon."""
        try:
            self._save_all(jobs)
            self._saved = time.monotonic()
        except OSError as error:
            if not is_full(error):
                raise
            _LOG.warning("%s has no room for a checkpoint: %s", self.folders.data, error)
            self._saved = time.monotonic() + ROOM_S - CHECKPOINT_S

    def _save_all(self, jobs: Mapping[str, RunningJob]) -> None:
        names = {
            job: checkpoint.save(self.folders.job(job), active, self._named.get(job), device_class=self.device_class)
            if active.step
            else None
            for job, active in jobs.items()
        }
        Manifest(self.runner.steps, self._cursor, self._closing, names).save(self.folders.pack(self.pack))
        self._named = names

    def _metrics(self, stepped: Stepped) -> None:
        entry = {
            "step": stepped.step,
            "loss": stepped.loss,
            "lr": stepped.learning_rate,
            "grad_norm": stepped.norm,
            "tokens": stepped.tokens,
            "skipped": stepped.skipped,
            "at": time.time(),
        }
        self.store.append(keys.metrics(JobId(stepped.job)), entry, maxlen=METRICS_KEPT)

    def _progress(self, active: RunningJob) -> None:
        record_progress(
            self.store,
            JobId(active.job.id),
            step=active.step,
            trained_tokens=active.tokens,
            loss_before=active.loss_before,
            fence=self.fence,
        )

    def _note(self, job: JobId, message: str, *, level: str = "info", held_out_loss: float | None = None) -> None:
        data = {} if held_out_loss is None else {"held_out_loss": held_out_loss}
        self.store.append(keys.log(job), {"level": level, "message": message, "at": time.time(), "data": data})
