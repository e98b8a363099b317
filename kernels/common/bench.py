"""How fast an op is on this machine: the median of some calls, and the pace that it means for the work of cost.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import torch

CALLS, WARM = 30, 5


@dataclass(frozen=True, slots=True)
class Case:
    """A call to time, and its work."""

    name: str
    call: Callable[[], object]
    flops: int
    bytes: int


@torch.inference_mode()
def show(cases: Iterable[Case]) -> None:
    """A line for every case: microseconds, GFLOP/s and GB/s."""
    for case in cases:
        for _ in range(WARM):
            case.call()
        took = median(_seconds(case.call) for _ in range(CALLS))
        pace = f"{case.flops / took / 1e9:9.1f} GFLOP/s {case.bytes / took / 1e9:8.1f} GB/s"
        print(f"{case.name:48s} {took * 1e6:10.1f} us {pace}")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
