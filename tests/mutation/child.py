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


def in_a_child(act: Callable[[], int], *, cpu_s: float, wall_s: float) -> int:
    """Its exit code; negative where a signal ended it, TIMED_OUT where a limit did. What it started ends with it."""
    child = os.fork()
    if child == 0:
        _live(act, cpu_s)
    until = time.monotonic() + wall_s
    try:
        while True:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                break
            if time.monotonic() > until:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return TIMED_OUT
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    return TIMED_OUT if code == -signal.SIGXCPU else code


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
