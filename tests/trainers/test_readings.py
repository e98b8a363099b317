"""Files are read once for all the jobs of a pack whose files they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from polygraft.cluster.model import FileId, Job, JobId, JobSpec, TenantId
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers.job import TrainJob
from polygraft.trainers.prepare import FileGone, prepare
from polygraft.trainers.readings import Readings

SPEC = JobSpec(backbone="tiny", training_file=FileId("one"), validation_file=FileId("two"), max_length=64)


def write(file: Path, answer: str) -> None:
    said = [{"role": "user", "content": "write"}, {"role": "assistant", "content": answer}]
    file.write_text(json.dumps({"messages": said}) + "\n")


class Files:
    """Jobs over the files of one folder, which share what was read."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.data, self.readings = data, Readings()
        self._tokeniser, self._backbone_files = Tokeniser.load(folder), BackboneFiles(folder)
        write(data / "one.jsonl", "graft")
        write(data / "two.jsonl", "prune")

    def job(self, spec: JobSpec = SPEC, id: str = "ftjob-1") -> TrainJob:
        return prepare(
            Job(id=JobId(id), tenant=TenantId("t"), spec=spec, created_at=0.0),
            files=self.data,
            tokeniser=self._tokeniser,
            backbone_files=self._backbone_files,
            micro_rows=128,
            readings=self.readings,
        )


@pytest.fixture
def files(folder: Path, tmp_path: Path) -> Files:
    return Files(folder, tmp_path)


def test_jobs_of_one_file_have_one_tuple_of_samples_whatever_their_grafts_are(files: Files) -> None:
    one, other = files.job(), files.job(replace(SPEC, peft="ia3"), id="ftjob-2")
    assert one.train is other.train and one.held_out is other.held_out and one.graft != other.graft


def test_what_is_read_otherwise_or_was_written_again_is_read_again(files: Files) -> None:
    first = files.job()
    assert files.job(replace(SPEC, max_length=63)).train is not first.train
    assert files.job(replace(SPEC, training_file=FileId("two"))).train == first.held_out
    write(files.data / "one.jsonl", "something else altogether")
    again = files.job()
    assert again.train != first.train and again.held_out is first.held_out


def test_a_file_that_is_gone_is_missed_whoever_has_read_it(files: Files) -> None:
    files.job()
    (files.data / "two.jsonl").unlink()
    with pytest.raises(FileGone, match="validation_file: the content of two is gone"):
        files.job()


def test_what_no_job_of_the_pack_has_is_forgotten(files: Files) -> None:
    here, gone = files.job(), files.job(replace(SPEC, training_file=FileId("two")))
    files.readings.forget_but([here])
    assert files.job().train is here.train
    assert files.job(replace(SPEC, training_file=FileId("two"))).train is not gone.train
