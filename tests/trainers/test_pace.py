"""When the jobs of a pack are expected to end, and who is left out of a checkpoint for that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polygraft.cluster.folders import Folders
from polygraft.cluster.model import JobId
from polygraft.cluster.states import JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.memory import MemoryStore
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.slab import Slab
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers import checkpoint, worker
from polygraft.trainers.pace import Paces
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.running import RunningJob
from polygraft.trainers.worker import PackWorker
from tests.killed_writers import JOB, LORA
from tests.trainers.submitted import PACK, submit

FIVE = replace(JOB, config=replace(JOB.config, epochs=5))  # steps


def test_a_job_is_expected_to_end_after_its_other_steps_at_the_pace_of_the_last() -> None:
    now = [0.0]
    paces = Paces(lambda: now[0])
    running = {"ftjob-1": RunningJob(FIVE, Slab(LORA))}
    paces.began("ftjob-1")
    assert paces.left_s(running) == {} and not paces.ending(running, 60.0), "nobody knows before its first step"
    now[0] = 3.0
    paces.stepped("ftjob-1")
    running["ftjob-1"].step = 1
    left_s = 3.0 * 4
    assert paces.left_s(running) == {"ftjob-1": left_s}
    assert paces.ending(running, left_s + 0.1) == {"ftjob-1"} and not paces.ending(running, left_s)
    running["ftjob-1"].step = 5
    assert not paces.ending(running, 60.0), "it waits to be published, maybe for room on the disk"


def test_who_is_published_soon_is_left_out_of_the_checkpoints_but_never_twice_in_a_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, saved, save = MemoryStore(), list[int](), checkpoint.save
    submit(store, tmp_path, {"ftjob-0": "ia3"})
    store.append(keys.commands(PACK), {"op": "close", "job": ""})

    def seen(folder: Path, running: RunningJob, *named: Any, **more: Any) -> str:
        saved.append(running.step)
        return save(folder, running, *named, **more)

    monkeypatch.setattr(worker, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(checkpoint, "save", seen)
    monkeypatch.setattr(Paces, "ending", lambda paces, running, within_s: frozenset(running))
    runner = PackRunner(Backbone.load(folder), max_rows=512)
    PackWorker(PACK, runner, Tokeniser.load(folder), store, folders=Folders(tmp_path), micro_rows=128).run(lambda: None)
    job = store.get(keys.job(JobId("ftjob-0")))
    assert saved == [2, 4, 6, 8, 10] and job is not None and job.value.state is JobState.SUCCEEDED
