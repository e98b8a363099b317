"""A forked process of its own for each run of tests: what is slow to import was imported before, and nothing stays."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import psutil

TIMED_OUT = 124
_MARK = "POLYGRAFT_TESTS_CHILD"  # in the environment of all that a child starts: its id
_LOOK_S = 0.5  # between looks at whether it computes
_DOZES_S, _ASLEEP_S, _NOTHING_S = 2.0, 15.0, 0.2  # one that computes no more than this for so long will not end
_HEAVY = ("torch", "numpy", "transformers", "ray", "ray.serve", "fastapi", "httpx", "hypothesis", "peft", "redis")


def preload() -> None:
    """Import what most tests need and is not ours. Nothing is computed: a process that forks after OpenMP made threads
    hangs in the child."""
    os.environ["OMP_NUM_THREADS"] = "1"
    plugins = (entry.module for entry in entry_points(group="pytest11"))
    for name in (*_HEAVY, *plugins):
        with contextlib.suppress(ImportError):
            import_module(name)
    gc.freeze()  # else a child's first collection copies all of it


class Child:
    """A process that acts within limits. Whatever runs in `folder` was started by it."""

    def __init__(self, act: Callable[[], int], *, cpu_s: float, wall_s: float, folder: str | None = None) -> None:
        self._left, self._seen, self._folder = wall_s, time.monotonic(), folder
        self._asleep, self._used = 0.0, 0.0
        self._code: int | None = None
        self.seconds = 0.0  # of processor time, once it has ended
        self._pid = os.fork()
        if self._pid == 0:
            _live(act, cpu_s)

    def ended(self) -> int | None:
        """Its exit code once it has ended; negative where a signal ended it, TIMED_OUT where a limit did. What it
        started ends with it."""
        if self._code is None:
            found, status, used = os.wait4(self._pid, os.WNOHANG)
            if found:
                self._kill()
                self._end_orphans()
                self.seconds = used.ru_utime + used.ru_stime
                code = os.waitstatus_to_exitcode(status)
                self._code = TIMED_OUT if code == -signal.SIGXCPU else code
            elif self._expired():
                self.end()
        return self._code

    @property
    def asleep(self) -> bool:
        """Whether it has not computed for a while."""
        return self._asleep > _DOZES_S

    def _expired(self) -> bool:
        """Whether it has lived too long, or slept for long. Time in which nobody looked counts a second: who looks may
        have been stopped with it; a processor that others keep is waited for."""
        now = time.monotonic()
        if now - self._seen < _LOOK_S:
            return False
        passed = min(now - self._seen, 1.0)
        self._seen = now
        self._left -= passed
        used, runs = _computed(self._pid)
        if runs or used > self._used + _NOTHING_S:
            self._asleep, self._used = 0.0, used
        else:
            self._asleep += passed
        return self._left < 0 or self._asleep > _ASLEEP_S

    def end(self) -> None:
        """Kill it, if it lives."""
        if self._code is None:
            self._kill()
            _, _, used = os.wait4(self._pid, 0)
            self._end_orphans()
            self.seconds = used.ru_utime + used.ru_stime
            self._code = TIMED_OUT

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)

    def _end_orphans(self) -> None:
        """What it started in a session of its own, as a store's server is, is ours by now, if we adopt."""
        for one in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if one.environ().get(_MARK) == str(self._pid) or self._within(one.cwd()):
                    one.kill()
                    one.wait(5.0)

    def _within(self, folder: str) -> bool:
        """A store's server writes its title over its environment, and stays in its folder."""
        return self._folder is not None and folder.startswith(f"{self._folder}/")


def adopt(orphans: bool = True) -> None:
    """Whether what loses its mother below this process is its child (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    ctypes.CDLL(None).prctl(36, int(orphans), 0, 0, 0)


def _computed(pid: int) -> tuple[float, bool]:
    """Seconds of processor time of a process and those below it, and whether one of them waits for none but a
    processor."""
    used, runs = 0.0, False
    with contextlib.suppress(psutil.NoSuchProcess):
        mother = psutil.Process(pid)
        for one in (mother, *mother.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                used += times.user + times.system
                runs = runs or _runs(one.pid)
    return used, runs


def _runs(pid: int) -> bool:
    """Whether one of its threads waits for a processor or a disk, or was stopped."""
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            if thread.read_text().rpartition(")")[2].split()[0] in "RDT":
                return True
    return False


def in_a_child(act: Callable[[], int], *, cpu_s: float, wall_s: float, folder: str | None = None) -> int:
    """The exit code of a child, as `Child.ended` has it."""
    child = Child(act, cpu_s=cpu_s, wall_s=wall_s, folder=folder)
    try:
        while (code := child.ended()) is None:
            time.sleep(0.02)
    finally:
        child.end()
    return code


def _live(act: Callable[[], int], cpu_s: float) -> None:
    code = 70
    try:
        os.setsid()
        os.environ[_MARK] = str(os.getpid())
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s) + 1, int(cpu_s) + 6))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        code = act()
    except BaseException:
        code = 70
    finally:
        sys.stdout.flush()
        os._exit(code)
