"""A pack that jobs come to and leave: what is written of the others then, and that it is enough after a crash."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from polygraft.cluster.folders import Folders
from polygraft.cluster.model import Job, JobId
from polygraft.cluster.states import JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store
from polygraft.cluster.store.memory import MemoryStore
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers import worker
from polygraft.trainers.manifest import Manifest
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.worker import PackWorker
from tests.trainers.submitted import PACK, submit, submit_one


class Crash(BaseException):
    """Stands for the process dying at a point."""


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return Backbone.load(folder, torch.float32, training=True)


def test_who_comes_and_goes_costs_the_others_no_checkpoint_and_they_go_on_after_a_crash(
    backbone: Backbone, tmp_path: Path
) -> None:
    peft, calm, stormy = "lora(r=4)", MemoryStore(), MemoryStore()
    submit(calm, tmp_path / "calm", dict.fromkeys(("ftjob-0", "ftjob-1"), peft))
    calm.append(keys.commands(PACK), {"op": "close", "job": ""})
    _run(calm, backbone, tmp_path / "calm")

    submit(stormy, tmp_path / "stormy", {"ftjob-0": peft})
    pack, heard = tmp_path / "stormy" / "packs" / PACK, list[int]()

    def heartbeat() -> None:
        heard.append(len(heard))
        if len(heard) == 2:  # after a step of the first job
            submit_one(stormy, tmp_path / "stormy", "ftjob-1", peft, 1)
            stormy.append(keys.commands(PACK), {"op": "close", "job": ""})
        named = Manifest.load(pack).jobs if heard[1:] else {}
        assert set(named.values()) <= {None}, "a checkpoint was written"
        if set(named) == {"ftjob-0"} and len(heard) > 2:  # the other one came and went
            raise Crash

    with pytest.raises(Crash):
        _run(stormy, backbone, tmp_path / "stormy", heartbeat)
    assert [job.state for job in _jobs(stormy)] == [JobState.RUNNING, JobState.SUCCEEDED]
    _run(stormy, backbone, tmp_path / "stormy")
    assert [(job.state, job.graft) for job in _jobs(stormy)] == [(job.state, job.graft) for job in _jobs(calm)]


def test_who_comes_while_another_one_is_let_in_takes_its_first_step_with_it(backbone: Backbone, tmp_path: Path) -> None:
    store, heard = MemoryStore(), list[int]()
    submit(store, tmp_path, {"ftjob-0": "ia3"})

    def heartbeat() -> None:
        if not heard:
            submit_one(store, tmp_path, "ftjob-1", "ia3", 1)
            store.append(keys.commands(PACK), {"op": "close", "job": ""})
        heard.append(len(heard))

    _run(store, backbone, tmp_path, heartbeat)
    steps = (tmp_path / "packs" / PACK / "steps.jsonl").read_text().splitlines()
    assert json.loads(steps[0])["jobs"] == ["ftjob-0", "ftjob-1"]
    assert [job.state for job in _jobs(store)] == [JobState.SUCCEEDED] * 2


def test_whoever_comes_on_and_on_the_first_step_is_taken(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "GATHERINGS", 3)
    store, steps = MemoryStore(), tmp_path / "packs" / PACK / "steps.jsonl"
    submit(store, tmp_path, {"ftjob-0": "ia3"})
    came = ["ftjob-0"]

    def heartbeat() -> None:
        if steps.exists() and steps.read_text():
            raise Crash
        came.append(f"ftjob-{len(came)}")
        submit_one(store, tmp_path, came[-1], "ia3", 1)

    with pytest.raises(Crash):
        _run(store, backbone, tmp_path, heartbeat)
    assert json.loads(steps.read_text().splitlines()[0])["jobs"] == came == ["ftjob-0", "ftjob-1", "ftjob-2"]


def _run(store: Store, backbone: Backbone, data: Path, heartbeat: Callable[[], None] = lambda: None) -> None:
    runner, tokeniser = PackRunner(backbone, max_rows=512), Tokeniser.load(backbone.folder)
    PackWorker(PACK, runner, tokeniser, store, folders=Folders(data), micro_rows=128).run(heartbeat)


def _jobs(store: Store) -> Iterator[Job]:
    for number in range(2):
        found = store.get(keys.job(JobId(f"ftjob-{number}")))
        assert found is not None
        yield found.value
