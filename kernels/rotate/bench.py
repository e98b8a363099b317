"""python -m polygraft.kernels.rotate.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from polygraft.kernels.common.bench import Case, show
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.rotate import cost
from polygraft.kernels.rotate.op import rotate
from polygraft.kernels.rotate.rotation import Rotation

WIDTH, GRAFTS, RANK = 576, 4, 8
# name -> (rotation; operands by name: columns; stack rows of a graft; size and number of the blocks that cost as much)
KINDS = {
    "blocks.32.1": (Rotation("blocks", 32), {"D": 32}, WIDTH, 32, 1),
    "blocks.4.2": (Rotation("blocks", 4, 2), {"D": 4}, 2 * WIDTH, 4, 2),
    "lowrank": (Rotation("lowrank"), {"A": WIDTH, "B": WIDTH}, RANK, 2 * RANK, 1),
    "pairs.64": (Rotation("pairs", 64), {"c": WIDTH, "s": WIDTH}, 1, 2, 1),
}


def cases(dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    for rows in (16, 512):
        each = rows // GRAFTS
        for kind, (rotation, columns, size, block, stages) in KINDS.items():
            items = (Segment(i * each, (i + 1) * each, i * size, (i + 1) * size) for i in range(GRAFTS))
            operands = {name: 0.1 * torch.randn(GRAFTS * size, width) for name, width in columns.items()}
            call = partial(rotate, torch.randn(rows, WIDTH).to(dtype), operands, rotation, Segments(tuple(items)))
            flops = cost.flops(rows, WIDTH, block=block, stages=stages)
            moved = cost.bytes_moved(rows, WIDTH, GRAFTS, block=block, itemsize=dtype.itemsize, stages=stages)
            yield Case(f"rotate, {rows} rows of {GRAFTS} grafts, {kind}", call, flops, moved)


if __name__ == "__main__":
    show(cases())
