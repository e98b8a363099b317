"""A forked process of its own for each run of tests: what is slow to import was imported before, and nothing stays."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points

TIMED_OUT = 124
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
    """A process that acts within limits."""

    def __init__(self, act: Callable[[], int], *, cpu_s: float, wall_s: float) -> None:
        self._until = time.monotonic() + wall_s
        self._code: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            _live(act, cpu_s)

    def ended(self) -> int | None:
        """Its exit code once it has ended; negative where a signal ended it, TIMED_OUT where a limit did. What it
        started ends with it."""
        if self._code is None:
            found, status = os.waitpid(self._pid, os.WNOHANG)
            if found:
                self._kill()
                code = os.waitstatus_to_exitcode(status)
                self._code = TIMED_OUT if code == -signal.SIGXCPU else code
            elif time.monotonic() > self._until:
                self.end()
        return self._code

    def end(self) -> None:
        """Kill it, if it lives."""
        if self._code is None:
            self._kill()
            os.waitpid(self._pid, 0)
            self._code = TIMED_OUT

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)


def in_a_child(act: Callable[[], int], *, cpu_s: float, wall_s: float) -> int:
    """The exit code of a child, as `Child.ended` has it."""
    child = Child(act, cpu_s=cpu_s, wall_s=wall_s)
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
