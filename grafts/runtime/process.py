"""How a process that computes is set up; torch-free, since it holds before the process starts."""

from __future__ import annotations

import os


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
