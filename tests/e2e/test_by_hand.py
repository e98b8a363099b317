"""The service as a person uses it from the shell, on a tiny backbone: the tutorial's commands as they are written, then
what is there after `down` and the next `up`, and after a head that was killed."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from polygraft.cluster.service import find_service
from polygraft.launch.commands.search_file import read_search_file
from polygraft.launch.main import app
from polygraft.launch.processes import session
from polygraft.launch.run_folder import RunFolder
from tests.tiny import tiny_llama

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
_BLOCK = re.compile(r"^```(console|python|yaml)\n(.+?)^```$", re.MULTILINE | re.DOTALL)
_SAVED = re.compile(r"Save this as\s+`([\w.]+)`")
_NUMBER = re.compile(r"\b(?=\w*\d)[\w.,:]*\w")  # an id or a time, too
CHAT = 'polygraft chat tickets -m "My screen is black." --max-tokens 40 --temperature 0'
# A micro-batch a step: the tiny tokenizer makes many tokens of an example.
PACK = {"POLYGRAFT_PACK__MICRO_ROWS": "600", "POLYGRAFT_PACK__MAX_ROWS": "1200"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True, slots=True)
class Shell:
    """Runs commands in a folder that is their home folder, too."""

    folder: Path

    def __call__(self, line: str, *, expect: int = 0) -> str:
        status, said, errors = self.run(line)
        assert status == expect, f"{line}: exit status {status}\n{said}\n{errors}"
        return said

    def run(self, line: str) -> tuple[int, str, str]:
        """Exit status, output and errors. What starts or ends processes has one of its own; what only talks to the
        service runs in this one, which has imported what takes seconds to import."""
        program, *arguments = shlex.split(line)
        with chdir(self.folder):
            if program == "polygraft" and arguments[0] in ("up", "down", "search"):
                command = (sys.executable, "-m", "polygraft.launch", *arguments)
                ended = subprocess.run(command, capture_output=True, text=True, timeout=170, env=self._environment)
                return ended.returncode, ended.stdout, ended.stderr
            if program == "polygraft":
                done = CliRunner(env=self._environment).invoke(app, arguments)
                return done.exit_code, done.stdout, f"{done.stderr}\n{done.exception!r}"
            with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said:
                patch.setenv("HOME", str(self.folder))
                runpy.run_path(*arguments)
            return 0, said.getvalue(), ""

    @property
    def home(self) -> Path:
        return self.folder / ".polygraft"

    @property
    def sessions(self) -> list[int]:
        """The supervisor and its children, each the leader of a session."""
        last = RunFolder(self.home).supervision
        assert last is not None
        return [last.supervisor.pid, *(child.pid for child in last.children)]

    @property
    def _environment(self) -> Mapping[str, str]:
        own = {"HOME": str(self.folder), "XDG_CACHE_HOME": str(self.folder / "cache")}
        return {**os.environ, **own, "POLYGRAFT_PORT": "0", "POLYGRAFT_DTYPE": "fp32", **PACK}


@dataclass(frozen=True, slots=True)
class Told:
    """What the tutorial shows after each command, empty where it shows nothing, and what the command said; and the
    processes of the service before its last command, `polygraft down`."""

    shown: Mapping[str, str]
    said: Mapping[str, str]
    leaders: list[int]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """The tiny backbone lies where the service keeps smollm2, and what is compiled is not compiled again."""
    shell = Shell(tmp_path_factory.mktemp("person"))
    cache = shell.folder / "cache" / "polygraft"
    tiny_llama(cache / "backbones" / "smollm2")
    compiled = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "polygraft" / "kernels"
    compiled.mkdir(parents=True, exist_ok=True)
    (cache / "kernels").symlink_to(compiled)
    yield shell
    shell.run("polygraft down")


@pytest.fixture(scope="module")
def told(shell: Shell) -> Told:
    """The tutorial from its first command to its last, but for the search."""
    text = TUTORIAL.read_text()
    shown: dict[str, str] = {}
    said: dict[str, str] = {}
    leaders: list[int] = []
    for block in _BLOCK.finditer(text):
        kind, body = block.groups()
        saved = _SAVED.findall(text[: block.start()].rpartition("```")[2])
        if saved:
            (shell.folder / saved[0]).write_text(body)
        elif kind == "python":
            script = body.replace("http://127.0.0.1:8000", find_service(shell.home / "run" / "service.json").url)
            (shell.folder / "client.py").write_text(script)
            said["client"] = shell("python client.py")
        for command in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:] if kind == "console" else ():
            line, _, output = command.partition("\n")
            if line == "polygraft down":
                leaders = shell.sessions
            if not line.startswith("polygraft search"):
                shown[line], said[line] = output, shell(line)
    return Told(shown, said, leaders)


def test_the_tutorials_commands_say_what_it_shows(told: Told, shell: Shell) -> None:
    """Line by line, but for what the model answers, and for numbers, ids and times."""
    assert len(told.said) > 10
    for line, shown in told.shown.items():
        if not line.startswith("polygraft chat"):
            said = [_NUMBER.sub("#", one).rstrip() for one in told.said[line].splitlines()]
            assert [one for one in shown.splitlines() if _NUMBER.sub("#", one) not in said] == [], told.said[line]
    models = ["smollm2", "tickets", "tickets-ia3", "tickets-union"]
    assert re.findall(rf"^({'|'.join(reversed(models))}) ", told.said["client"], re.MULTILINE) == models
    steps = [json.loads(line) for log in shell.home.glob("data/packs/*/steps.jsonl") for line in log.open()]
    assert steps and all({"rows", "jobs", "methods"} <= step.keys() for step in steps)
    assert read_search_file(shell.folder / "search.yaml").trials == 6


def test_nothing_runs_after_down_and_all_is_there_after_the_next_up(told: Told, shell: Shell) -> None:
    assert [list(session(leader)) for leader in told.leaders] == [[]] * len(told.leaders)
    shell("polygraft jobs", expect=3)

    shell("polygraft up")
    assert "already running" in shell("polygraft up")
    jobs = {job["fine_tuned_model"]: job for job in json.loads(shell("polygraft jobs --json"))}
    assert jobs.keys() == {"tickets@1", "tickets-ia3@1", "tickets-union@1"}
    assert {job["status"] for job in jobs.values()} == {"succeeded"}
    assert jobs["tickets@1"]["loss_after"] < jobs["tickets@1"]["loss_before"]
    assert jobs["tickets@1"]["id"] in told.said["polygraft story tickets@1"]
    assert "tickets@1" in shell("polygraft grafts list")
    assert shell(CHAT) == told.said[CHAT]

    _kill_the_head(shell)
    assert shell(CHAT) == told.said[CHAT]


@pytest.mark.nightly
def test_the_tutorials_search_publishes_its_trials_and_draws_the_front(told: Told, shell: Shell) -> None:
    (line,) = re.findall(r"^\$ (polygraft search .+)$", TUTORIAL.read_text(), re.MULTILINE)
    shell("polygraft up")
    shell(line)
    assert (shell.folder / "front.png").stat().st_size > 0
    assert "tickets-search-3" in shell("polygraft grafts list")


def _kill_the_head(shell: Shell) -> None:
    """SIGKILL the head; return when the supervisor has started another one that answers."""
    head = shell.sessions[-1]
    os.kill(head, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline, "the head did not come back"
        time.sleep(0.2)
        if psutil.pid_exists(head) and list(session(head)):
            continue
        if shell.run("polygraft jobs")[0] == 0:
            return
