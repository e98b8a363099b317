"""How fast a device computes: one large product, timed."""

from __future__ import annotations

import time

import torch

from polygraft.grafts.runtime.backbone import best_dtype

_ROWS, _WIDTH = 256, 2048
_FOR_S = 1.0  # the best within it counts: whatever else runs only slows a product down
_LEAST = 3


def product_speed(device: str, threads: int) -> float:
    """Floating-point operations a second of [256, 2048] x [2048, 2048] in the dtype that backbones have there by
    default, on so many threads of a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        dtype = best_dtype(device)
        x = torch.ones(_ROWS, _WIDTH, dtype=dtype, device=device)
        w = torch.ones(_WIDTH, _WIDTH, dtype=dtype, device=device)
        best, runs, end = float("inf"), 0, time.perf_counter() + _FOR_S
        while runs < _LEAST or time.perf_counter() < end:
            begin = time.perf_counter()
            torch.nn.functional.linear(x, w)
            if x.is_cuda:
                torch.cuda.synchronize()
            best, runs = min(best, time.perf_counter() - begin), runs + 1
        return 2.0 * _ROWS * _WIDTH * _WIDTH / best
    finally:
        torch.set_num_threads(before)
