"""The service as a person uses it from the shell, on a tiny backbone: up, submit, chat, down, and up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from polygraft.launch.processes import session
from polygraft.launch.run_folder import RunFolder
from tests.tiny import tiny_llama

TRAINING = "".join(
    json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}) + "\n"
    for question, answer in 8 * [("What is a graft?", "A shoot on a stock."), ("When do you do it?", "In late winter.")]
)


@dataclass(frozen=True, slots=True)
class Shell:
    """Runs `polygraft` in processes of its own, on one home folder."""

    home: Path

    def __call__(self, *arguments: str, expect: int = 0) -> str:
        command = (sys.executable, "-m", "polygraft.launch", "--home", str(self.home), *arguments)
        done = subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=self.home.parent)
        assert done.returncode == expect, f"{arguments}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    @property
    def sessions(self) -> list[int]:
        """The supervisor and its children, each the leader of a session."""
        last = RunFolder(self.home).supervision
        assert last is not None
        return [last.supervisor.pid, *(child.pid for child in last.children)]


@pytest.fixture
def polygraft(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path / "home")
    yield shell
    shell("down")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_up_submit_chat_down_and_all_is_there_after_the_next_up(tmp_path: Path, polygraft: Shell) -> None:
    tiny = tiny_llama(tmp_path / "tiny")
    (tmp_path / "train.jsonl").write_text(TRAINING)
    polygraft("up", "--port", "0", "--backbone", str(tiny), "--dtype", "fp32")
    assert "already running" in polygraft("up", "--port", "0")
    file = str(tmp_path / "train.jsonl")
    options = ("--peft", "lora(r=4)", "--epochs", "4", "--lr", "5e-3", "--suffix", "mine")
    job = json.loads(polygraft("submit", file, "--validation-file", file, *options, "--json"))
    assert job["status"] == "succeeded" and job["loss_after"] < job["loss_before"]
    answer = polygraft("chat", "mine", "-m", "What is a graft?", "--max-tokens", "8", "--temperature", "0")
    assert "published" in polygraft("story", "mine@1")

    leaders = polygraft.sessions
    polygraft("down")
    assert [list(session(leader)) for leader in leaders] == [[]] * len(leaders)
    polygraft("jobs", expect=3)

    polygraft("up", "--port", "0", "--backbone", str(tiny), "--dtype", "fp32")
    assert [one["id"] for one in json.loads(polygraft("jobs", "--json"))] == [job["id"]]
    assert "mine@1" in polygraft("grafts", "list")
    assert polygraft("chat", "mine@1", "-m", "What is a graft?", "--max-tokens", "8", "--temperature", "0") == answer

    _kill_the_head(polygraft)
    assert polygraft("chat", "mine@1", "-m", "What is a graft?", "--max-tokens", "8", "--temperature", "0") == answer


def _kill_the_head(polygraft: Shell) -> None:
    """SIGKILL the head; return when the supervisor has started another one that answers."""
    head = polygraft.sessions[-1]
    os.kill(head, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline, "the head did not come back"
        time.sleep(0.5)
        if psutil.pid_exists(head) and list(session(head)):
            continue
        doctor = subprocess.run(
            (sys.executable, "-m", "polygraft.launch", "--home", str(polygraft.home), "jobs"),
            capture_output=True,
        )
        if doctor.returncode == 0:
            return
