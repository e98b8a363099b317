"""The pack's worker: reads commands at step boundaries, steps the runner, and writes down what happened. Knows no Ray.

All it needs after a crash lies in the pack's manifest, the jobs' checkpoints and the store. Nothing that happens to
one job leaves the loop; only the loss of the store, the device or the process does. A process that is killed by one of
its jobs is told by `Blame`.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from polygraft.cluster.advance import advance_job, advance_pack
from polygraft.cluster.events import JobCancelled, JobDeviceClassChanged, JobFailed, JobStarted, PackOpened
from polygraft.cluster.folders import Folders
from polygraft.cluster.model import JobError, JobId, PackId
from polygraft.cluster.states import IllegalTransition
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import EntryId, Store
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.runtime.process import allocation_failed
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.kernels.common.room import is_full
from polygraft.kernels.dense.device_class import device_class
from polygraft.trainers import checkpoint, handover
from polygraft.trainers.failure import Failed, failure
from polygraft.trainers.joining import Joining
from polygraft.trainers.leaving import Leaving
from polygraft.trainers.manifest import Manifest
from polygraft.trainers.pace import Paces
from polygraft.trainers.publishing import ROOM_S, NoRoom, Publishing
from polygraft.trainers.ranks import RankLost
from polygraft.trainers.reports import Reports
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.running import RunningJob
from polygraft.trainers.steplog import StepLog
from polygraft.trainers.underway import Underway

_LOG = logging.getLogger(__name__)
CHECKPOINT_S = 30.0
PROGRESS_S = 1.0
IDLE_S = 0.5
GATHER_S, GATHERINGS = 0.1, 32  # how long, how often in a row others are waited for where nobody trains yet
SUSPECTS_WAIT_S = 60.0  # how long the suspects of a kill are kept out while others go on
_ADMISSION = -1  # what is underway before a job's first step


class PackWorker:
    """One incarnation of a pack's worker; a newer one fences it out of the store."""

    def __init__(  # noqa: PLR0913
        self,
        pack: PackId,
        runner: PackRunner,
        tokeniser: Tokeniser,
        store: Store,
        *,
        folders: Folders,
        micro_rows: int,
        step_floor_s: float = 0.0,
    ) -> None:
        """A step takes `step_floor_s` seconds at least."""
        self.pack, self.runner, self.store, self.folders = pack, runner, store, folders
        self._joining = Joining(runner, tokeniser, store, folders, BackboneFiles(runner.backbone.folder), micro_rows)
        lease = store.acquire(keys.pack_scope(pack), f"worker of {pack}", 60.0, steal=True)
        assert lease is not None, "a stolen lease is always granted"
        self.fence = lease.fence
        self._reports = Reports(store, lease.fence)
        self._max_rows = runner.max_rows
        self._underway = Underway(folders.pack(pack))
        runner.underway = self._underway.note
        self.device_class = str(device_class(runner.backbone.device))
        self._leaving = Leaving(pack, store, lease.fence, folders, self.device_class)
        self._paces = Paces()
        self._step_floor_s = step_floor_s
        self._stopped = False
        self._log = StepLog(folders.pack(pack), str(runner.backbone.device))
        self._saved = self._progressed = time.monotonic()
        self._left_out: frozenset[str] = frozenset()  # of the last checkpoints
        self._publishing = Publishing(runner, store, lease.fence, folders, self._reports, self.device_class)

    def run(self, heartbeat: Callable[[], None]) -> None:
        """Serve the command stream until it says close and no job is left, or stop: what jobs there are then are saved
        as of their last step. `heartbeat` is called at every step boundary."""
        self._begin()
        came = 0
        try:
            while self.runner.jobs or self._outside or not self._closing:
                self._obey(wait_s=GATHER_S if came else 0.0 if self._training or self._outside else IDLE_S)
                if self._stopped:
                    return
                self._let_leave()
                came = came + 1 if self._seat() and not any(one.step for one in self.runner.jobs.values()) else 0
                if self.runner.jobs and came % GATHERINGS == 0:
                    self._step()
                heartbeat()
        except Exception as error:
            # What was underway may have killed another rank, or taken the memory that everybody's work needs.
            if not (isinstance(error, RankLost) or allocation_failed(error)):
                self._underway.clear()  # it ends by itself: there is nothing to find out about its jobs
            raise
        finally:
            self._log.close()
            self._underway.close()

    def _begin(self) -> None:
        """Take up what the worker before this one left, and what it was killed at."""
        manifest = Manifest.load(self.folders.pack(self.pack))
        self._cursor, self._closing = EntryId(manifest.cursor), manifest.closing
        self._named: Mapping[str, str | None] = manifest.jobs
        self._outside = {JobId(job): name for job, name in manifest.jobs.items()}
        self.runner.steps = manifest.step
        self._blame = manifest.blame
        guilty: str | None = None
        if killed_at := self._underway.left():
            self._blame, guilty = manifest.blame.after_death(killed_at)
            _LOG.warning("%s: a worker was killed with %s underway", self.pack, dict(killed_at))
            try:
                replace(manifest, blame=self._blame).save(self.folders.pack(self.pack))
                self._underway.clear()
            except OSError as error:  # then it is known for as long as this worker lives
                if not is_full(error):
                    raise
        advance_pack(self.store, PackOpened(pack=self.pack, at=time.time()), fence=self.fence)
        if guilty is not None:
            where = "joining its pack" if killed_at[guilty] == _ADMISSION else f"step {killed_at[guilty] + 1}"
            why = "its worker was killed again, with this job alone in it, as when memory is short"
            fault = JobError("killed_its_worker", f"{where}: {why}; shorten its examples (max_length)")
            self._fail(JobId(guilty), fault)
        self._started, self._trying = time.monotonic(), False
        for job in list(self._outside):
            self._take_up(job)

    def _take_up(self, job: JobId) -> None:
        """What became of a job of the manifest while nobody worked: it may have left, or been told to."""
        found = self.store.get(keys.job(job))
        if found is None or found.value.final:
            self._drop(job)  # which a crash may have prevented
        elif found.value.pack != self.pack:
            self._let_go(job)
        elif found.value.moving_to is not None:
            self._leaving.jobs.add(job)

    @property
    def _training(self) -> bool:
        """Whether a job has steps left; the others wait for room on the disk."""
        return any(not running.finished for running in self.runner.jobs.values())

    def _obey(self, wait_s: float) -> None:
        entries = self.store.read(keys.commands(self.pack), self._cursor, wait_s=wait_s)
        for entry_id, entry in entries:
            job = JobId(str(entry.get("job")))
            match entry["op"]:
                case "admit":
                    if job not in self.runner.jobs:
                        self._outside[job] = checkpoint.newest(self.folders.job(job))
                        self._blame = self._blame.taking(job, handover.read(self.folders.job(job)))
                case "leave":
                    self._leaving.jobs.add(job)
                case "cancel":
                    self._cancel(job)
                case "close":
                    self._closing = True
                case "stop":  # read again by a worker that follows this one
                    self._stopped = True
                    break
            self._cursor = entry_id
        if self._stopped:
            self._save()
        elif entries:
            self._record()

    def _let_leave(self) -> None:
        """Those that go on in another pack, between two of their steps."""
        for job in self._leaving.due(self.runner.jobs, self._outside):
            running = self.runner.jobs.get(job)
            if running is not None:
                self._reports.progress(running)
            named = self._named.get(job) if running is not None else self._outside[job]
            try:
                left = self._leaving.leave(job, running, named, self._blame.seen.get(job))
            except Exception as error:
                self._lose(failure(job, "its checkpoint", error, "checkpoint_not_saved"))
                continue
            if left:
                self._let_go(job)
                self._record()

    def _seat(self) -> bool:
        """Let in who is outside, if anybody. The suspects of a kill come after all others, or after a while, one at a
        time and alone, until they are past where they are suspected."""
        suspects = self._blame.suspects()
        if not self._outside or any(job in self.runner.jobs for job in suspects):
            return False
        waiting = [JobId(job) for job in suspects if job in self._outside]
        others = [job for job in self._outside if job not in waiting]
        late = time.monotonic() - self._started > SUSPECTS_WAIT_S
        if waiting and (self._trying or late or not (others or self.runner.jobs)):
            self._trying = True
            self._empty()
            others = waiting[:1]
        for job in others:
            self._admit(job)
        return bool(others)

    def _empty(self) -> None:
        """Everyone out, to come back from here."""
        self._save()
        for job in list(self.runner.jobs):
            self.runner.remove(job)
            self._outside[JobId(job)] = self._named.get(job)

    def _admit(self, job: JobId) -> None:
        """Take a job in, from its checkpoint if it has one, or fail it with the line or field to blame."""
        name = self._outside.pop(job)
        found = self.store.get(keys.job(job))
        if found is None or found.value.final or found.value.pack != self.pack:
            self._drop(job)
            return
        self._underway.note({job: _ADMISSION})
        running = self._joining.join(found.value, name)
        self._underway.clear()
        if isinstance(running, JobError):
            self._fail(job, running)
            return
        trained = running.job
        started = JobStarted(
            job=job,
            pack=self.pack,
            parameters=trained.graft.parameters,
            steps_total=trained.last_step,
            device_class=self.device_class,
            at=time.time(),
        )
        try:
            advance_job(self.store, started, fence=self.fence)
            self._compare_class(job, running.device_class)
        except IllegalTransition:  # cancelled or failed while its data was read
            self._drop(job)
            return
        self._paces.began(job)
        for warning in trained.warnings:
            self._reports.note(job, warning, level="warn")
        self._reports.note(
            job,
            f"training {trained.graft.spec.method}: {trained.last_step - running.step} steps in {self.pack}",
            held_out=running.before,
        )
        self._reports.progress(running)

    def _compare_class(self, job: JobId, before: str | None) -> None:
        """Say so where what the job goes on from is of another class of device than this one."""
        if before is not None and before != self.device_class:
            changed = JobDeviceClassChanged(
                job=job, pack=self.pack, before=before, after=self.device_class, at=time.time()
            )
            advance_job(self.store, changed, fence=self.fence)
            promise = "bits are the same within a class alone, from here on numbers are equal to a tolerance"
            self._reports.note(job, f"goes on on {self.device_class}; its steps so far are of {before}: {promise}")

    def _cancel(self, job: JobId) -> None:
        if job in self.runner.jobs or job in self._outside:
            with suppress(IllegalTransition):  # it ended by itself just before
                advance_job(self.store, JobCancelled(job=job, at=time.time()), fence=self.fence)
            self._drop(job)

    def _step(self) -> None:
        if self._training:
            self._forward()
        for job, running in list(self.runner.jobs.items()):
            if running.finished and job in self.runner.jobs:
                self._underway.note({job: running.step})
                self._publish(JobId(job), running)
        self._underway.clear()
        self._blame = self._blame.at({job: running.step for job, running in self.runner.jobs.items()})
        now = time.monotonic()
        if now - self._progressed > PROGRESS_S:
            self._progressed = now
            for running in self.runner.jobs.values():
                self._reports.progress(running)
            self._reports.pace(self.pack, self._paces.left_s(self.runner.jobs))
        if now - self._saved > CHECKPOINT_S:
            ending = self._paces.ending(self.runner.jobs, CHECKPOINT_S) if not self._blame.seen else frozenset()
            self._save(ending - self._left_out)  # who is published soon is left out, though not twice in a row

    def _forward(self) -> None:
        before = dict(self.runner.jobs)
        self.runner.max_rows = self._blame.rows(self._max_rows)
        done = self.runner.step()
        self._log.write(done, {job: running.job.graft.spec.method for job, running in before.items()})
        for stepped in done.stepped:
            self._reports.metrics(stepped)
            self._paces.stepped(stepped.job)
        for failed in done.failed:
            self._lose(failed)
        if done.seconds < self._step_floor_s:
            time.sleep(self._step_floor_s - done.seconds)

    def _publish(self, job: JobId, running: RunningJob) -> None:
        """A job without a step left leaves the pack as a graft; where there is no room for that, it stays."""
        try:
            error = self._publishing.publish(job, running)
        except NoRoom:
            return
        except IllegalTransition:  # cancelled at the last moment
            self._drop(job)
            return
        if error is not None:
            self._fail(job, error)
        else:
            self._drop(job)
            self._record()

    def _drop(self, job: str) -> None:
        """Leave the pack; what a job saved for its restart is of no more use once the store knows its end."""
        self._let_go(job)
        found = self.store.get(keys.job(JobId(job)))
        if found is None or found.value.final:
            shutil.rmtree(self.folders.job(job), ignore_errors=True)

    def _let_go(self, job: str) -> None:
        """Leave the pack, as it is."""
        self._publishing.forget(JobId(job))
        if job in self.runner.jobs:
            self.runner.remove(job)
        self._outside.pop(JobId(job), None)
        self._blame = self._blame.without(job)
        self._leaving.jobs.discard(JobId(job))
        self._paces.ended(job)

    def _fail(self, job: JobId, error: JobError) -> None:
        with suppress(IllegalTransition):
            advance_job(self.store, JobFailed(job=job, error=error, at=time.time()), fence=self.fence)
            self._reports.note(job, error.message, level="error")
        self._drop(job)

    def _lose(self, failed: Failed) -> None:
        self._fail(JobId(failed.job), JobError(failed.code, failed.message))

    def _save(self, left_out: frozenset[str] = frozenset()) -> None:
        """Checkpoint every job but these at its last step boundary, then the manifest that names them all. Where there
        is no room for that, the last manifest and what it names stay as they are, and it is tried again soon."""
        if self._has_room(lambda: self._save_all(left_out)):
            self._saved, self._left_out = time.monotonic(), left_out

    def _record(self) -> None:
        """The manifest as commands and those who left have changed it, with the checkpoints that there are: who comes
        and goes costs the others no write. Blame says what jobs are past, so with any they are saved as they are."""
        if self._blame.seen:
            self._save()
        else:
            named = {job: self._named.get(job) for job in self.runner.jobs}
            self._has_room(lambda: self._write(named))

    def _has_room(self, save: Callable[[], None]) -> bool:
        try:
            save()
        except OSError as error:
            if not is_full(error):
                raise
            _LOG.warning("%s has no room for a checkpoint: %s", self.folders.data, error)
            self._saved = time.monotonic() + ROOM_S - CHECKPOINT_S
            return False
        return True

    def _save_all(self, left_out: frozenset[str]) -> None:
        names: dict[str, str | None] = {}
        for job, running in list(self.runner.jobs.items()):
            self._underway.note({job: running.step})
            try:
                names[job] = self._named.get(job) if job in left_out else self._checkpoint(job, running)
            except Exception as error:
                if is_full(error):
                    raise
                self._lose(failure(job, f"{running.at}, its checkpoint", error, "checkpoint_not_saved"))
            finally:
                self._underway.clear()
        self._write(names)

    def _write(self, inside: Mapping[str, str | None]) -> None:
        names: dict[str, str | None] = {**inside, **{str(job): name for job, name in self._outside.items()}}
        Manifest(self.runner.steps, self._cursor, self._closing, names, self._blame).save(self.folders.pack(self.pack))
        self._named = names

    def _checkpoint(self, job: str, running: RunningJob) -> str | None:
        """The name of the job's checkpoint for the manifest: the one before, where the disk does not take another."""
        before = self._named.get(job)
        if not running.step:
            return None
        try:
            return checkpoint.save(self.folders.job(job), running, before, device_class=self.device_class)
        except OSError as error:
            if is_full(error):
                raise
            _LOG.warning("%s keeps its checkpoint %s: %s", job, before or "at its start", error)
            return before
