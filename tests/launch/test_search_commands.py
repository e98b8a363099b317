"""What `polygraft search` sends for a file, and for nothing but examples and a budget; and after Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from typer.testing import CliRunner

from polygraft.cluster.answers import RemoteFile
from polygraft.cluster.client import Client
from polygraft.launch import searching
from polygraft.launch.commands.common import Flags
from polygraft.launch.commands.search_file import SearchFile, read_search_file, within
from polygraft.launch.main import app
from polygraft.launch.output import Failure
from polygraft.tuning.request import SearchRequest
from tests.tuning.standin import SHAPE


class Uploads(Client):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []

    def upload(self, file: Path | bytes, *, filename: str | None = None, purpose: str = "fine-tune") -> RemoteFile:
        content = file if isinstance(file, bytes) else file.read_bytes()
        self.sent.append((filename or "", content))
        return RemoteFile(id=f"file-{len(self.sent)}", filename=filename or "", bytes=len(content), created_at=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train.jsonl", "held-out.jsonl"):
        (tmp_path / name).write_text(f"examples of {name}")
    return tmp_path


def read(folder: Path, text: str) -> SearchFile:
    (folder / "search.yaml").write_text(text)
    return read_search_file(folder / "search.yaml")


def test_a_file_is_a_request_with_its_data_uploaded(folder: Path) -> None:
    client = Uploads()
    files = "name: s, training_file: train.jsonl, validation_file: held-out.jsonl"
    body = read(folder, f"{{{files}, space: {{kind: nls, ranks: [4, 2]}}, limits: {{bytes: 9000}}}}").body(client)
    assert [content for _, content in client.sent] == [b"examples of train.jsonl", b"examples of held-out.jsonl"]
    assert (body["training_file"], body["validation_file"]) == ("file-1", "file-2")
    plan = SearchRequest.model_validate(body).plan(backbone="tiny", shape=SHAPE)
    assert plan.limits[0].most == 9000 and plan.space.parameters[0].name == "r_0_0"


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ("groups: 3", "groups: unknown field"),
        ("sampler: best", "sampler"),
        ("space: {kind: autopeft, g: 1}", "g: unknown"),
    ],
)
def test_a_wrong_file_names_the_field(folder: Path, more: str, wrong: str) -> None:
    with pytest.raises(Failure, match=wrong):
        read(folder, f"{{name: s, training_file: train.jsonl, validation_file: held-out.jsonl, {more}}}")


def test_examples_and_a_budget_are_split_and_make_a_request(tmp_path: Path) -> None:
    lines = [f'{{"example": {number}}}' for number in range(20)]
    (tmp_path / "Pairs of 2026.jsonl").write_text("\n".join(lines))
    client = Uploads()
    body, plan = within(tmp_path / "Pairs of 2026.jsonl", "4 trials", client)
    train, held_out = (content.decode().splitlines() for _, content in client.sent)
    assert len(held_out) == 3 and sorted(train + held_out) == sorted(lines)
    assert body["name"] == "pairs-of-2026-search" and plan.why
    assert SearchRequest.model_validate(body).plan(backbone="tiny", shape=SHAPE).trials == 4


def test_too_few_examples_and_a_bad_budget_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text("{}\n")
    with pytest.raises(Failure, match="1 examples are too few"):
        within(tmp_path / "one.jsonl", "20m", Uploads())
    (tmp_path / "two.jsonl").write_text("{}\n{}\n")
    with pytest.raises(Failure, match="--budget: 'soon'"):
        within(tmp_path / "two.jsonl", "soon", Uploads())


def test_a_search_whose_terminal_is_interrupted_goes_on_under_its_id(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    begun = {"id": "study-1", "name": "s", "created_at": 1, "status": "running", "trials_total": 4}
    file = {"id": "file-1", "filename": "train.jsonl", "bytes": 1, "created_at": 1}
    answers = {"/v1/files": file, "/v1/searches/study-1/trials": {"data": [], "has_more": False}}

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.method, request.url.path))
        return httpx.Response(200, json=answers.get(request.url.path, begun))

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    client = Client("http://service", "pg-key", transport=httpx.MockTransport(answer))
    monkeypatch.setattr(Flags, "client", lambda _: client)
    monkeypatch.setattr(client, "close", lambda: None)
    monkeypatch.setattr(searching, "time", SimpleNamespace(sleep=interrupt))
    (folder / "s.yaml").write_text("{name: s, training_file: train.jsonl, validation_file: held-out.jsonl}")
    done = CliRunner().invoke(app, ["search", str(folder / "s.yaml")])
    assert done.exit_code != 0 and "polygraft searches study-1" in done.stderr
    assert {path for method, path in asked if method == "POST"} == {"/v1/files", "/v1/searches"}, "nothing is cancelled"
    again = CliRunner().invoke(app, ["searches", "study-1", "--json"])
    assert (again.exit_code, json.loads(again.stdout)["id"]) == (0, "study-1"), again.stderr
