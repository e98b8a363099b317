"""The nf4 op's program as launches specialise it for bf16 rows."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from polygraft.kernels.common.aot import Tuned
from polygraft.kernels.common.tiles import HEIGHTS
from polygraft.kernels.nf4 import cost
from polygraft.kernels.nf4.gpu import FEATURES
from polygraft.kernels.nf4.programs import linear_kernel

WIDE = 4096  # in and out


def tuned() -> Iterator[Tuned]:
    pointers = {"codes_ptr": "*u8", "absmax_ptr": "*fp32", "levels_ptr": "*fp32"}
    for height, rows in zip(HEIGHTS, (16, 512), strict=True):
        work = f"{rows} rows, {WIDE} by {WIDE}, rank 16"
        constants = {"HEIGHT": height, "WIDTH": 16, "FEATURES": FEATURES, "BLOCK": cost.BLOCK, "ACT": "identity"}
        flops, moved = cost.flops(rows, WIDE, WIDE), cost.bytes_moved(rows, WIDE, WIDE, itemsize=2)
        name = f"linear, {height} rows"
        yield Tuned(name, linear_kernel, {**constants, "ACC": tl.float32}, work, flops, moved, pointers)
