"""What a job's examples are cut to, and that its owner is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polygraft.cluster.folders import Folders
from polygraft.cluster.model import FileId, Job, JobId, JobSpec, TenantId
from polygraft.cluster.policy.budget import state_bytes
from polygraft.cluster.store import keys
from polygraft.cluster.store.memory import MemoryStore
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.cost import StepCost
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.spec import SpecError
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers.job import TrainJob
from polygraft.trainers.memory import Memory, TooLarge
from polygraft.trainers.prepare import prepare
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.worker import PackWorker
from tests.trainers.submitted import PACK, submit

FILE = FileId("file-1")
SPEC = JobSpec(backbone="tiny", training_file=FILE, peft="ia3")
CUT = "1 of 2 examples are longer than"


def prepared(folder: Path, data: Path, spec: JobSpec, words: int) -> TrainJob:
    """A job of one long example and a short one."""
    data.mkdir(exist_ok=True)
    lines = [
        {"messages": [{"role": "user", "content": "write"}, {"role": "assistant", "content": "graft " * count + "end"}]}
        for count in (words, 2)
    ]
    (data / f"{FILE}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = Job(id=JobId("ftjob-1"), tenant=TenantId("t"), spec=spec, created_at=0.0)
    return prepare(
        job, files=data, tokeniser=Tokeniser.load(folder), backbone_files=BackboneFiles(folder), micro_rows=128
    )


def test_by_default_nothing_is_cut_that_the_positions_have_room_for(folder: Path, tmp_path: Path) -> None:
    job = prepared(folder, tmp_path, SPEC, words=350)
    assert len(job.train[0].ids) > 350 and job.warnings == ()
    assert job.train[0].ids[-2] in Tokeniser.load(folder).eos_ids and job.train[0].weights[-2] == 1.0


@pytest.mark.parametrize(("peft", "room"), [("ia3", 512), ("prefix(300)", 212)])
def test_what_the_positions_have_no_room_for_is_cut_and_told(
    folder: Path, tmp_path: Path, peft: str, room: int
) -> None:
    job = prepared(folder, tmp_path, replace(SPEC, peft=peft), words=600)
    assert len(job.train[0].ids) == room
    (warning,) = job.warnings
    assert warning.startswith(f"training_file: {CUT} {room} tokens (the longest has ")


def test_a_cut_that_was_asked_for_is_counted_for_each_file(folder: Path, tmp_path: Path) -> None:
    whole = prepared(folder, tmp_path, SPEC, words=100).train
    job = prepared(folder, tmp_path, replace(SPEC, max_length=50, validation_file=FILE), words=100)
    lengths = [len(sample.ids) for sample in whole]
    trained = [int(sum(sample.weights)) for sample in whole]
    left = trained[0] - int(sum(whole[0].weights[:50]))
    expected = (
        f"{CUT} 50 tokens (the longest has {lengths[0]}) and are cut: {lengths[0] - 50} of {sum(lengths)} tokens are "
        f"left out, {left} of the {sum(trained)} trained ones among them"
    )
    assert job.warnings == (f"training_file: {expected}", f"validation_file: {expected}")


def test_a_job_that_does_not_say_is_cut_to_what_a_packs_memory_has_room_for(folder: Path, tmp_path: Path) -> None:
    prepared(folder, tmp_path, SPEC, words=300)
    job = Job(id=JobId("ftjob-1"), tenant=TenantId("t"), spec=SPEC, created_at=0.0)
    backbone_files, tokeniser = BackboneFiles(folder), Tokeniser.load(folder)
    graft = BoundGraft(parse("ia3"), backbone_files.shape)
    memory = Memory(state_bytes(graft.parameters, graft.frozen) + StepCost(graft, 4).bytes([90]), 4)

    def told(spec: JobSpec) -> TrainJob:
        record = replace(job, spec=spec)
        return prepare(
            record,
            files=tmp_path,
            tokeniser=tokeniser,
            backbone_files=backbone_files,
            micro_rows=128,
            longest=memory.longest,
        )

    cut = told(SPEC)
    assert 90 <= cut.train[0].rows < 300 and memory.fitted(cut).train == cut.train
    assert cut.warnings[0].startswith(f"training_file: {CUT} {cut.train[0].rows + 1} tokens")
    with pytest.raises(TooLarge, match="example 1 has"):
        memory.fitted(told(replace(SPEC, max_length=300)))


def test_a_graft_that_leaves_no_room_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="max_length: 2 tokens and the 511"):
        prepared(folder, tmp_path, replace(SPEC, peft="prefix(511)"), words=2)


def test_a_cut_is_an_event_of_the_job(folder: Path, tmp_path: Path) -> None:
    store, backbone = MemoryStore(), Backbone.load(folder, torch.float32)
    submit(store, tmp_path, {"ftjob-0": "ia3"})
    path = tmp_path / "files" / "file-ftjob-0.jsonl"
    long = [{"role": "user", "content": "write"}, {"role": "assistant", "content": "graft " * 600}]
    path.write_text(path.read_text() + json.dumps({"messages": long}) + "\n")
    worker = PackWorker(
        PACK, PackRunner(backbone), Tokeniser.load(folder), store, folders=Folders(tmp_path), micro_rows=128
    )
    store.append(keys.commands(PACK), {"op": "close"})
    worker.run(lambda: None)
    told = [entry for _, entry in store.read(keys.log(JobId("ftjob-0")))]
    warnings = [str(entry["message"]) for entry in told if entry["level"] == "warn"]
    assert [text.partition(" tokens")[0] for text in warnings] == [
        f"{name}: 1 of 4 examples are longer than 512" for name in ("training_file", "validation_file")
    ]
