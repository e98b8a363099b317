"""How a process that computes is set up; torch-free, since it holds before the process starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def device_environment() -> dict[str, str]:
    """Environment of a process that owns a device share.

    All cores, whatever Ray gives an actor, and threads that spin only briefly before they sleep, since they share the
    cores with other processes. On glibc, freed memory stays in one heap: a step allocates what the last one freed, and
    handing pages back between steps made packed training 8% slower (docs/log.md).
    """
    return {
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        "GOMP_SPINCOUNT": "20000",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "33554432",
        "MALLOC_TRIM_THRESHOLD_": "1000000000",
    }


def in_own_thread(make: Callable[[], T]) -> T:
    """What `make` returns, made in a thread that then ends, and its OpenMP team with it.

    Each thread that ever computed in parallel keeps a team, and as soon as the teams of a process outnumber its cores
    OpenMP lets waiting threads sleep at once: a decode step took 107 ms in place of 60 (docs/log.md). So a process
    that computes in one thread does everything else that computes through here.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
