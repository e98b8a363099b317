"""A pack on a disk that fills up: training goes on, what cannot be written waits for room, and no work is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from polygraft.cluster.folders import Folders
from polygraft.cluster.model import Job
from polygraft.cluster.states import JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.memory import MemoryStore
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers import publishing as publishing_module
from polygraft.trainers import worker as worker_module
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.worker import PackWorker
from tests.small_disk import SmallDisk, small_disk
from tests.tiny import tiny_llama
from tests.trainers.submitted import PACK, submit

JOBS = {f"ftjob-{i}": peft for i, peft in enumerate(("lora(r=4, at=attn.*)", "ia3", "prefix(4)"))}
FIRST, LAST = "ftjob-2", "ftjob-0"  # in the order in which they come to their last step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32)


@pytest.fixture(scope="module")
def undisturbed(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return {job.id: job.graft for job in Run(backbone, tmp_path_factory.mktemp("data")).to_the_end(lambda _: None)}


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    for module in (worker_module, publishing_module):
        monkeypatch.setattr(module, "ROOM_S", 0.01)
    monkeypatch.setattr(worker_module, "IDLE_S", 0.01)  # between two looks of a worker whose jobs all wait for room
    with small_disk(tmp_path / "disk", mib=8) as disk:
        yield disk


class Run:
    """Three jobs in one pack over the in-memory store, the data folder on a disk of the test's."""

    def __init__(self, backbone: Backbone, data: Path) -> None:
        self.store, self.data, self.backbone = MemoryStore(), data, backbone
        submit(self.store, data, JOBS)
        self.store.append(keys.commands(PACK), {"op": "close", "job": ""})

    def to_the_end(self, at_a_step: Callable[[Run], None]) -> list[Job]:
        runner = PackRunner(self.backbone, max_rows=512)
        tokeniser = Tokeniser.load(self.backbone.folder)
        worker = PackWorker(PACK, runner, tokeniser, self.store, folders=Folders(self.data), micro_rows=128)
        worker.run(lambda: at_a_step(self))
        return self.jobs

    @property
    def jobs(self) -> list[Job]:
        return [found.value for found in self.store.scan(keys.JOBS)]

    @property
    def states(self) -> dict[str, JobState]:
        return {job.id: job.state for job in self.jobs}


def test_a_job_that_finds_no_room_for_its_graft_waits_and_the_others_train_on(
    backbone: Backbone, disk: SmallDisk, undisturbed: dict[str, str | None]
) -> None:
    seen: list[dict[str, int]] = []

    def fill_and_free(run: Run) -> None:
        if not seen:
            disk.fill()
        seen.append({job.id: job.step for job in run.jobs})
        if len(seen) == 40:
            assert set(run.states.values()) == {JobState.RUNNING}, "nobody has ended: their grafts wait for room"
            log = [str(entry["message"]) for _, entry in run.store.read(keys.log(run.jobs[0].id))]
            assert "no room" in log[-1]
            disk.make_room()

    jobs = Run(backbone, disk.folder).to_the_end(fill_and_free)
    assert len(seen) > 40
    assert {job.id: job.state for job in jobs} == dict.fromkeys(JOBS, JobState.SUCCEEDED)
    assert {job.id: job.graft for job in jobs} == undisturbed


def test_a_checkpoint_that_finds_no_room_is_written_when_there_is_some(
    backbone: Backbone, disk: SmallDisk, undisturbed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "CHECKPOINT_S", 0.0)
    steps = 0

    def fill_and_free(run: Run) -> None:
        nonlocal steps
        steps += 1
        if steps == 1:
            disk.fill()
        if steps == 4:
            kept = {path.parent.name for path in run.data.glob("jobs/*/checkpoint-*")}
            drafts = list(run.data.rglob(".*.draft-*"))
            assert not drafts and len(kept) <= len(JOBS)
            disk.make_room()
        if steps == 6:
            assert list(run.data.glob(f"jobs/{LAST}/checkpoint-*"))

    jobs = Run(backbone, disk.folder).to_the_end(fill_and_free)
    assert {job.id: job.graft for job in jobs} == undisturbed
