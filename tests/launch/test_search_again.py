"""A search that was stopped goes on by the same file and `--study`, though its data would be uploaded once more."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from polygraft.cluster.answers import RemoteFile
from polygraft.cluster.client import Client
from polygraft.cluster.model import DataFile, FileId, StudyId, TenantId
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Write
from polygraft.cluster.store.memory import MemoryStore
from polygraft.launch.commands.search import files_of
from polygraft.launch.commands.search_file import SearchFile, read_search_file
from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.record import open_study
from tests.tuning.standin import SHAPE

STUDY, EVE = StudyId("study-1"), TenantId("eve")


class Uploads(Client):
    """Keeps a record of every file, as the service does."""

    def __init__(self, store: MemoryStore) -> None:
        self.store, self.count = store, 0

    def upload(self, file: Path | bytes, *, filename: str | None = None, purpose: str = "fine-tune") -> RemoteFile:
        assert isinstance(file, Path)
        self.count += 1
        record = DataFile(
            id=FileId(f"file-{self.count}"),
            tenant=EVE,
            filename=file.name,
            bytes=1,
            purpose=purpose,
            created_at=0.0,
            digest=sha256(file.read_bytes()).hexdigest(),
            examples=1,
        )
        self.store.commit([Write(keys.file(record.id), record, 0)])
        return RemoteFile(id=record.id, filename=record.filename, bytes=record.bytes, created_at=0)


@pytest.fixture
def file(tmp_path: Path) -> SearchFile:
    for name in ("train.jsonl", "held-out.jsonl"):
        (tmp_path / name).write_text(f"examples of {name}")
    (tmp_path / "search.yaml").write_text("{name: s, training_file: train.jsonl, validation_file: held-out.jsonl}")
    return read_search_file(tmp_path / "search.yaml")


def plan(file: SearchFile, client: Uploads) -> SearchPlan:
    return file.plan(client, backbone="tiny", shape=SHAPE, uploaded=files_of(client.store, STUDY))


def test_the_plan_of_a_study_that_was_begun_is_the_same_again(file: SearchFile) -> None:
    client = Uploads(MemoryStore())
    first = plan(file, client)
    open_study(client.store, STUDY, first, tenant=EVE, clock=lambda: 0.0).ask()
    assert plan(file, client) == first
    assert client.count == 2


def test_other_data_make_another_plan(file: SearchFile) -> None:
    client = Uploads(MemoryStore())
    first = plan(file, client)
    open_study(client.store, STUDY, first, tenant=EVE, clock=lambda: 0.0)
    file.training_file.write_text("other examples")
    assert plan(file, client) != first
