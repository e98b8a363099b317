"""The rotate op's programs for blocks as launches specialise them for bf16 rows and float32 blocks."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from polygraft.kernels.common.aot import Tuned
from polygraft.kernels.common.tiles import HEIGHTS
from polygraft.kernels.rotate import cost
from polygraft.kernels.rotate.gpu import HEIGHT, WIDTHS
from polygraft.kernels.rotate.programs import squares_kernel, turn_kernel

WIDE, GRAFTS = 4096, 8


def tuned() -> Iterator[Tuned]:
    pointers = {"d_ptr": "*fp32", "channels_ptr": "*i64", "segments_ptr": "*i64"}
    arithmetic = {"ACC": tl.float32, "PRECISION": "tf32x3"}
    for width, block in zip(WIDTHS, (16, 64), strict=True):
        for height, rows in zip(HEIGHTS, (2, 64), strict=True):
            work = f"{GRAFTS} grafts of blocks of {block}, {rows} rows each, {WIDE} wide"
            flops = cost.flops(GRAFTS * rows, WIDE, block=block)
            moved = cost.bytes_moved(GRAFTS * rows, WIDE, GRAFTS, block=block, itemsize=2)
            turn = {**arithmetic, "HEIGHT": height, "WIDTH": width, "TRANSPOSED": False}
            yield Tuned(f"turn, {height} rows, blocks of {block}", turn_kernel, turn, work, flops, moved, pointers)
        back, given = {**turn, "TRANSPOSED": True}, {**pointers, "out_ptr": "*fp32"}
        yield Tuned(f"turn backward, blocks of {block}", turn_kernel, back, work, flops, moved, pointers)
        squares = {**arithmetic, "HEIGHT": HEIGHT, "WIDTH": width}
        yield Tuned(f"squares, blocks of {block}", squares_kernel, squares, work, flops, moved, given)
