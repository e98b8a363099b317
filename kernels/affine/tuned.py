"""The affine op's programs as launches specialise them for bf16 rows and float32 vectors."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from polygraft.kernels.affine import cost
from polygraft.kernels.affine.gpu import HEIGHT, WIDTH
from polygraft.kernels.affine.programs import affine_kernel, sums_kernel
from polygraft.kernels.common.aot import Tuned

ROWS, FEATURES, GRAFTS = 512, 4096, 8


def tuned() -> Iterator[Tuned]:
    flops, moved = cost.flops(ROWS, FEATURES), cost.bytes_moved(ROWS, FEATURES, GRAFTS, itemsize=2)
    constants = {"HEIGHT": HEIGHT, "WIDTH": WIDTH, "SCALE": True, "SHIFT": True, "ACC": tl.float32}
    pointers = dict.fromkeys(("g_ptr", "b_ptr", "dg_ptr", "db_ptr"), "*fp32")
    pointers |= dict.fromkeys(("index_ptr", "groups_ptr", "spans_ptr"), "*i64")
    work = f"{ROWS} rows of {GRAFTS} grafts, {FEATURES} wide"
    yield Tuned("affine", affine_kernel, constants, work, flops, moved, pointers, dot=False)
    yield Tuned("sums", sums_kernel, constants, work, flops, moved, pointers, dot=False)
