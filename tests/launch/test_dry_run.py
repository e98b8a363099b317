"""`submit --dry-run`: the command says what would be cut, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from polygraft.cluster.client import Client
from polygraft.launch.commands.common import Flags
from polygraft.launch.main import app

WARNING = "1 of 2 examples are longer than 100 tokens (the longest has 310) and are cut: 210 of 330 tokens are left out"
FILE = {"id": "file-1", "examples": 2, "complete": True, "tokens": 330, "trained_tokens": 305, "longest": 310, "cut": 1}
FOUND = {
    "model": "smollm2",
    "peft": "lora",
    "parameters": 460800,
    "learning_rate": 0.0003,
    "max_length": 100,
    "steps": 3,
    "training_file": {**FILE, "warning": WARNING},
}


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_dry_run_says_what_is_cut_and_deletes_what_it_uploaded(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.method, request.url.path))
        match request.url.path:
            case "/v1/files":
                uploaded = {"id": "file-1", "filename": "t.jsonl", "bytes": 3, "created_at": 1}
                return httpx.Response(200, json=uploaded)
            case "/v1/models":
                model = {"id": "smollm2", "created": 0, "owned_by": "polygraft"}
                return httpx.Response(200, json={"data": [model], "has_more": False})
            case "/v1/fine_tuning/dry_runs":
                return httpx.Response(200, json=FOUND)
        return httpx.Response(200, json={"id": "file-1", "object": "file", "deleted": True})

    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(Flags, "client", lambda _: Client("http://service", "pg-key", transport=transport))
    (tmp_path / "t.jsonl").write_text("{}\n")
    done = CliRunner().invoke(app, ["submit", str(tmp_path / "t.jsonl"), "--max-length", "100", "--dry-run", *options])
    assert done.exit_code == 0, done.stderr
    if options:
        assert json.loads(done.stdout)["training_file"]["warning"] == WARNING
    else:
        assert WARNING in " ".join(done.stdout.split())
    assert asked[-2:] == [("POST", "/v1/fine_tuning/dry_runs"), ("DELETE", "/v1/files/file-1")]
