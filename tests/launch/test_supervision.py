"""The supervisor's loop, over real child processes that are killed for real."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from polygraft.launch.children import GaveUp, supervise
from polygraft.launch.processes import Identity, session
from polygraft.launch.program import Program
from polygraft.launch.restarts import Restarts

# Writes its pid when it is up, then starts a grandchild in a process group of its own, as Ray's raylet does, and waits.
STAND_IN = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""


def test_a_killed_child_is_started_again_and_nothing_is_left_after_stop(tmp_path: Path, started: Started) -> None:
    first, second = stand_in(tmp_path, "first"), stand_in(tmp_path, "second")
    stop, done = started(first, second)
    pid = read_pid(tmp_path / "second")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: read_pid(tmp_path / "second") != pid)
    assert not list(session(pid)), "the killed child's own children are still there"
    leaders = [read_pid(tmp_path / name) for name in ("first", "second")]
    stop.set()
    done.result(timeout=20)
    assert [list(session(leader)) for leader in leaders] == [[], []]


def test_a_child_starts_only_when_those_before_it_are_ready(tmp_path: Path, started: Started) -> None:
    gate = threading.Event()
    first = stand_in(tmp_path, "first", ready=gate.is_set)
    started(first, stand_in(tmp_path, "second"))
    read_pid(tmp_path / "first")
    time.sleep(0.6)
    assert not (tmp_path / "second").exists()
    gate.set()
    assert read_pid(tmp_path / "second")


def test_a_child_that_dies_before_it_is_ready_ends_the_attempt(tmp_path: Path, started: Started) -> None:
    healthy = stand_in(tmp_path, "healthy")
    broken = Program(
        name="broken",
        command=(sys.executable, "-c", "print('no such backbone'); exit(3)"),
        log=tmp_path / "log",
        is_ready=lambda: False,
    )
    _, done = started(healthy, broken)
    with pytest.raises(GaveUp, match="broken ended with status 3 before it was ready"):
        done.result(timeout=20)
    assert "no such backbone" in (tmp_path / "log").read_text()
    assert not list(session(read_pid(tmp_path / "healthy")))


def test_a_child_that_keeps_dying_is_given_up() -> None:
    restarts = Restarts(limit=3, window_s=60.0)
    assert [restarts.after_death(at) for at in (0.0, 1.0, 2.0, 3.0)] == [0.2, 0.4, 0.8, None]


def test_deaths_outside_the_window_are_forgotten() -> None:
    restarts = Restarts(limit=1, window_s=60.0)
    assert [restarts.after_death(at) for at in (0.0, 60.0, 120.0)] == [0.2, 0.2, 0.2]


def test_a_later_process_with_the_same_pid_is_another_one() -> None:
    here = Identity.of(os.getpid())
    assert here.alive()
    assert not Identity(here.pid, here.started - 60.0).alive()


Started = Callable[..., tuple[threading.Event, "Future[None]"]]


@pytest.fixture
def started() -> Iterator[Started]:
    """Runs `supervise` in a thread; stopped when the test ends, whatever became of it."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        yield lambda *children: (stop, thread.submit(supervise, children, stop))
        stop.set()


def stand_in(folder: Path, name: str, ready: Callable[[], bool] | None = None) -> Program:
    path = folder / name
    return Program(
        name=name,
        command=(sys.executable, "-c", STAND_IN, str(path)),
        log=folder / f"{name}.log",
        is_ready=ready or path.exists,
    )


def read_pid(path: Path) -> int:
    wait_for(path.exists)
    return int(path.read_text())


def wait_for(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)
