"""Jobs that move from one pack of a backbone to another while they train: what is published is what an unmoved job
publishes, bit for bit, wherever a crash comes between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

from polygraft.cluster.advance import advance_job, advance_pack
from polygraft.cluster.events import (
    GraftPublished,
    JobAdmitted,
    JobCancelRequested,
    JobMoving,
    JobRequeued,
    JobStarted,
    PackOpening,
)
from polygraft.cluster.folders import Folders
from polygraft.cluster.model import START, DeviceId, Job, JobId, PackId
from polygraft.cluster.states import JobState, Reason
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import OLDEST, Append
from polygraft.cluster.store.memory import MemoryStore
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers.blame import Blame, Seen
from polygraft.trainers.manifest import Manifest
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.worker import PackWorker
from tests.tiny import tiny_llama
from tests.trainers.submitted import PACK, submit

pytestmark = pytest.mark.usefixtures("one_thread")

OTHER = PackId("pack-2")
JOBS = {
    "ftjob-0": "lora(r=4, at=attn.*)",
    "ftjob-1": "prefix(4) + mezo(0.05)",
    "ftjob-2": "lora(r=2, dropout=0.2) + serial(4)",
}
MOVED = (JobId("ftjob-1"), JobId("ftjob-2"))
MICRO_ROWS = 32  # two or three micro-batches a step for the moved ones: they may not leave within one


class Crash(BaseException):
    """Stands for the process dying at a point."""


class Packs:
    """Two packs of one backbone over one store, worked one after the other; the controller's part is played."""

    def __init__(self, backbone: Backbone, data: Path) -> None:
        self.backbone, self.data, self.store = backbone, data, MemoryStore()
        submit(self.store, data, JOBS)
        advance_pack(
            self.store,
            PackOpening(
                pack=OTHER,
                backbone="tiny",
                devices=(DeviceId("d1"),),
                bytes=1,
                epoch=1,
                reason=Reason.JOBS_WAIT,
                at=0.0,
            ),
        )

    def job(self, job: str) -> Job:
        found = self.store.get(keys.job(JobId(job)))
        assert found is not None
        return found.value

    def work(self, pack: PackId, at_a_step: Callable[[PackWorker], None] = lambda _: None) -> int:
        """The pack's worker until its end, and how often it crashed on the way."""
        crashes = 0
        while True:
            runner, tokeniser = PackRunner(self.backbone, max_rows=512), Tokeniser.load(self.backbone.folder)
            worker = PackWorker(pack, runner, tokeniser, self.store, folders=Folders(self.data), micro_rows=MICRO_ROWS)
            try:
                worker.run(partial(at_a_step, worker))
                return crashes
            except Crash:
                crashes += 1

    def move(self, job: JobId) -> None:
        moving = JobMoving(job=job, pack=PACK, to=OTHER, reason=Reason.JOINED, at=2.0)
        advance_job(self.store, moving, appends=[_command(PACK, "leave", job)])

    def move_all(self, worker: PackWorker) -> None:
        """Once those that move have taken a step."""
        running = [worker.runner.jobs[job] for job in MOVED if job in worker.runner.jobs]
        if len(running) == len(MOVED) and all(one.step for one in running) and self.job(MOVED[0]).moving_to is None:
            for job in MOVED:
                self.move(job)
            self.close(PACK)

    def admit(self) -> None:
        """Who has left goes where it was sent."""
        for job in MOVED:
            found = self.job(job)
            if found.waiting and found.moving_to is not None:
                admitted = JobAdmitted(job=job, pack=found.moving_to, at=3.0)
                advance_job(self.store, admitted, appends=[_command(found.moving_to, "admit", job)])
        self.close(OTHER)

    def close(self, pack: PackId) -> None:
        self.store.append(keys.commands(pack), {"op": "close", "job": ""})


def _command(pack: PackId, op: str, job: JobId) -> Append:
    return Append(keys.commands(pack), {"op": op, "job": job})


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32, training=True)


@pytest.fixture(scope="module")
def unmoved(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Job]:
    torch.set_num_threads(1)
    packs = Packs(backbone, tmp_path_factory.mktemp("unmoved"))
    packs.close(PACK)
    packs.work(PACK)
    return {job: packs.job(job) for job in JOBS}


def test_jobs_that_move_while_they_train_end_as_unmoved_ones_and_take_no_step_twice(
    backbone: Backbone, unmoved: Mapping[str, Job], tmp_path: Path
) -> None:
    packs = Packs(backbone, tmp_path)
    packs.work(PACK, packs.move_all)
    assert [packs.job(job).pack for job in JOBS] == [PACK, None, None]
    assert [packs.job(job).reason for job in MOVED] == [Reason.MOVING] * 2
    packs.admit()
    packs.work(OTHER)
    for job, alone in unmoved.items():
        found = packs.job(job)
        assert (found.state, found.graft, found.step) == (JobState.SUCCEEDED, alone.graft, alone.step)
        assert (found.loss_before, found.loss_after) == (alone.loss_before, alone.loss_after)
        steps = [entry["step"] for _, entry in packs.store.read(keys.metrics(JobId(job)), OLDEST)]
        assert steps == list(range(1, alone.step + 1))
    assert not list((tmp_path / "jobs").iterdir()), "checkpoints of published jobs are gone"


def test_jobs_that_are_put_down_are_taken_up_elsewhere_after_their_last_step(
    backbone: Backbone, unmoved: Mapping[str, Job], tmp_path: Path
) -> None:
    """As when the pack's node drains: no step is computed twice, though no checkpoint was due."""
    packs = Packs(backbone, tmp_path)
    told: list[bool] = []

    def stop(worker: PackWorker) -> None:
        running = worker.runner.jobs.values()
        if not told and len(running) == len(JOBS) and all(one.step for one in running):
            told.append(True)
            packs.store.append(keys.commands(PACK), {"op": "stop"})

    packs.work(PACK, stop)
    assert told and all(packs.job(job).state is JobState.RUNNING for job in JOBS)
    packs.work(PACK)  # a worker that comes after it, as when it died before it was seen to have ended
    for id_ in map(JobId, JOBS):
        advance_job(packs.store, JobRequeued(job=id_, reason=Reason.PACK_CLOSED, blamed=False, at=3.0))
        admitted = JobAdmitted(job=id_, pack=OTHER, at=3.0)
        advance_job(packs.store, admitted, appends=[_command(OTHER, "admit", id_)])
    packs.close(OTHER)
    packs.work(OTHER)
    for job, alone in unmoved.items():
        assert packs.job(job).graft == alone.graft
        steps = [entry["step"] for _, entry in packs.store.read(keys.metrics(JobId(job)), OLDEST)]
        assert steps == list(range(1, alone.step + 1))


CRASHES = {
    "before its checkpoint": ("leaving.checkpoint.save", False),
    "before what it is suspected of": ("leaving.handover.write", False),
    "before it is told": ("leaving.advance_job", False),
    "after it was told": ("leaving.advance_job", True),
    "before the manifest without it": ("worker.PackWorker._let_go", False),
    "after the manifest without it": ("worker.PackWorker._let_leave", True),
    "before the other pack takes it": ("worker.PackWorker._admit", False),
    "when the other pack has read it": ("joining.checkpoint.load", True),
    "when the other pack has started it": ("worker.PackWorker._admit", True),
    "before it is published": ("publishing.publish", False),
}


OFTEN = {"after it was told", "before the manifest without it", "when the other pack has read it"}


@pytest.mark.parametrize(
    "where", [where if where in OFTEN else pytest.param(where, marks=pytest.mark.nightly) for where in CRASHES]
)
def test_a_crash_anywhere_between_two_packs_loses_no_job_and_changes_no_bit(
    where: str, backbone: Backbone, unmoved: Mapping[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = Packs(backbone, tmp_path)
    place, after = CRASHES[where]
    module, _, name = f"polygraft.trainers.{place}".rpartition(".")
    real, holder = resolve_name(f"{module}.{name}"), resolve_name(module)
    crashed: list[str] = []

    def crash() -> None:
        on_the_way = any(job.moving_to is not None or job.pack == OTHER for job in map(packs.job, MOVED))
        if on_the_way and not crashed:
            crashed.append(where)
            raise Crash

    def crashing(*given: object, **more: object) -> object:
        if not after:
            crash()
        result = real(*given, **more)
        crash()
        return result

    monkeypatch.setattr(holder, name, crashing)
    deaths = packs.work(PACK, packs.move_all)
    packs.admit()
    deaths += packs.work(OTHER)
    assert (deaths, crashed) == (1, [where])
    assert {job: packs.job(job).graft for job in JOBS} == {job: one.graft for job, one in unmoved.items()}
    published = [one.event.graft.job for one in packs.store.events(START) if isinstance(one.event, GraftPublished)]
    assert sorted(map(str, published)) == sorted(JOBS)


def test_a_job_that_is_cancelled_on_the_way_keeps_nobody_waiting(backbone: Backbone, tmp_path: Path) -> None:
    """The command comes after the job has left: it is nobody's any more, and its record says so."""
    packs = Packs(backbone, tmp_path)

    def cancel(worker: PackWorker) -> None:
        packs.move_all(worker)
        if packs.job(MOVED[0]).waiting and not packs.job(MOVED[0]).cancel_requested:
            advance_job(packs.store, JobCancelRequested(job=MOVED[0], at=2.5))
            packs.store.append(keys.commands(PACK), {"op": "cancel", "job": MOVED[0]})

    packs.work(PACK, cancel)
    assert packs.job(MOVED[0]).waiting and packs.job(MOVED[0]).cancel_requested
    assert packs.job("ftjob-0").state is JobState.SUCCEEDED


def test_a_suspect_of_a_killed_worker_is_one_in_the_pack_it_moves_to(
    backbone: Backbone, unmoved: Mapping[str, Job], tmp_path: Path
) -> None:
    packs, suspect, folders = Packs(backbone, tmp_path), MOVED[0], Folders(tmp_path)
    started = JobStarted(job=suspect, pack=PACK, parameters=1, steps_total=12, at=1.0)
    advance_job(packs.store, started)
    cursor = packs.store.read(keys.commands(PACK))[-1][0]
    blame = Blame(2, {suspect: Seen(deaths=2, step=3)})
    Manifest(0, cursor, False, dict.fromkeys(JOBS), blame).save(folders.pack(PACK))
    packs.move(suspect)
    packs.close(PACK)
    packs.work(PACK)
    assert packs.job(suspect).waiting
    packs.admit()
    seen: list[tuple[str, ...]] = []
    packs.work(OTHER, lambda _: seen.append(Manifest.load(folders.pack(OTHER)).blame.suspects()))
    assert seen[0] == (suspect,)
    assert packs.job(suspect).graft == unmoved[suspect].graft
