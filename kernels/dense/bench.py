"""python -m polygraft.kernels.dense.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from polygraft.kernels.branch import cost as branches
from polygraft.kernels.common.bench import Case, show
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.compiled.build import build
from polygraft.kernels.dense import cost
from polygraft.kernels.dense.library import SOURCE
from polygraft.kernels.dense.op import FusedBranch, Weights, linear

WIDTH, RANK, GRAFTS = 576, 16, 8


def cases() -> Iterator[Case]:
    """Raises `build.Unavailable` where the op cannot be built."""
    build(SOURCE)
    W, A, B = (torch.randn(rows, WIDTH).bfloat16() for rows in (WIDTH, GRAFTS * RANK, GRAFTS * RANK))
    packed = Weights.packed([W])
    for rows in (16, 512):
        x, own = torch.randn(rows, WIDTH).bfloat16(), rows // GRAFTS
        segments = Segments(
            tuple(Segment(i * own, (i + 1) * own, i * RANK, (i + 1) * RANK) for i in range(GRAFTS)),
        )
        shapes = [(own, RANK)] * GRAFTS
        flops = cost.flops(rows, WIDTH, WIDTH) + branches.flops(shapes, WIDTH, WIDTH)
        moved = cost.bytes_moved(rows, WIDTH, WIDTH) + branches.bytes_moved(shapes, WIDTH, WIDTH, itemsize=2)
        yield Case(
            f"dense, {rows} rows",
            partial(linear, x, packed, [(FusedBranch(0, A, B, "identity"), segments)]),
            flops,
            moved,
        )


if __name__ == "__main__":
    show(cases())
