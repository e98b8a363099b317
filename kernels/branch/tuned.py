"""The branch op's programs as launches specialise them for bf16: decoding tiles of 16 rows, training tiles of 64."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from polygraft.kernels.branch import cost
from polygraft.kernels.branch.programs import columns_kernel, expand_kernel, outer_kernel, shrink_kernel
from polygraft.kernels.common.aot import Tuned

WIDTH = 4096  # of x and y in the work that the roofline is of: a projection of an 8B Llama
GRAFTS = 8


def tuned() -> Iterator[Tuned]:
    for height, rows in ((16, 2), (64, 64)):
        for rank in (16, 64):
            work = f"{GRAFTS} grafts of rank {rank}, {rows} rows each, {WIDTH} wide"
            shapes = [(rows, rank)] * GRAFTS
            # Half of the op: x A^T, or h B.
            half = cost.flops(shapes, WIDTH, 0), cost.bytes_moved(shapes, WIDTH, 0, itemsize=2)
            tile = {"HEIGHT": height, "WIDTH": rank, "ACC": tl.float32}
            name = f"{height} rows, rank {rank}"
            down = {**tile, "DEPTH": 64, "ACT": "identity", "BIASED": False, "BACKWARD": False}
            up = {**tile, "FEATURES": 64, "ACT": "identity", "SCALED": True}
            yield Tuned(f"shrink, {name}", shrink_kernel, down, work, *half)
            yield Tuned(f"expand, {name}", expand_kernel, up, work, *half)
            yield Tuned(f"shrink with bias, {name}", shrink_kernel, {**down, "BIASED": True}, work, *half)
            if height == 64:
                down = {**down, "ACT": "gelu", "BACKWARD": True}
                yield Tuned(f"shrink backward, {name}", shrink_kernel, down, work, *half)
                yield Tuned(f"outer, {name}", outer_kernel, {**up, "ADD": True}, work, *half)
                sums = cost.bias_flops(shapes), cost.bias_bytes(shapes, itemsize=2)
                yield Tuned(f"bias gradient, {name}", columns_kernel, {**tile, "ADD": True}, work, *sums, dot=False)
