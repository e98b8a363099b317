"""The sparse op's programs as launches specialise them for bf16 rows and float32 values; what whole rows of S multiply
is the branch's."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from polygraft.kernels.common.aot import Tuned
from polygraft.kernels.common.tiles import HEIGHTS
from polygraft.kernels.sparse import cost
from polygraft.kernels.sparse.gpu import ENTRIES, FEATURES, ROWS
from polygraft.kernels.sparse.programs import columns_kernel, meet_kernel, values_kernel

WIDE, GRAFTS = 4096, 8
SHARE = WIDE * WIDE // 100  # entries of a graft
LINES = 64  # rows of S of a graft


def tuned() -> Iterator[Tuned]:
    places = dict.fromkeys(("entry_ptr", "other_ptr", "ranges_ptr", "i_ptr", "segments_ptr"), "*i64")
    pointers = {**places, "v_ptr": "*fp32", "bounds_ptr": "*i32"}
    for height, rows in zip(HEIGHTS, (2, 64), strict=True):
        one = cost.flops(rows, SHARE), cost.bytes_moved(rows, SHARE, WIDE, itemsize=2)
        flops, moved = (GRAFTS * each for each in one)
        work = f"{GRAFTS} grafts of {SHARE} entries, {rows} rows each, {WIDE} wide"
        tile = {"HEIGHT": height, "FEATURES": FEATURES, "ACC": tl.float32}
        entries = {**tile, "ENTRIES": True}
        yield Tuned(f"entries, {height} rows", meet_kernel, entries, work, flops, moved, pointers, dot=False)
        if height == 64:
            values = {"HEIGHT": ROWS, "WIDTH": ENTRIES, "ADD": False, "ACC": tl.float32}
            given = {**pointers, "out_ptr": "*fp32"}
            yield Tuned("values' gradient", values_kernel, values, work, flops, moved, given, dot=False)
        lines = f"{GRAFTS} grafts of {LINES} rows of S, {rows} rows each"
        moved = GRAFTS * cost.column_bytes(rows, LINES, itemsize=2)
        scatter = {**tile, "ENTRIES": False}
        adds = GRAFTS * rows * LINES
        yield Tuned(f"scatter, {height} rows", meet_kernel, scatter, lines, adds, moved, pointers, dot=False)
        gather = {"HEIGHT": height, "WIDTH": LINES}
        yield Tuned(f"gather, {height} rows", columns_kernel, gather, lines, 0, moved, pointers, dot=False)
