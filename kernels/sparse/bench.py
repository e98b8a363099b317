"""python -m polygraft.kernels.sparse.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from polygraft.kernels.common.bench import Case, show
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.sparse import cost
from polygraft.kernels.sparse.op import sparse
from polygraft.kernels.sparse.order import SparseIndex

WIDTH, ENTRIES, GRAFTS = 576, 3318, 8  # 1% of the weights


def cases(dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    index = SparseIndex(torch.randint(0, WIDTH, (GRAFTS * ENTRIES, 2)))
    values = torch.randn(GRAFTS * ENTRIES, 1)
    for rows in (16, 512):
        each = rows // GRAFTS
        items = (Segment(i * each, (i + 1) * each, i * ENTRIES, (i + 1) * ENTRIES) for i in range(GRAFTS))
        x, y = torch.randn(rows, WIDTH).to(dtype), torch.zeros(rows, WIDTH, dtype=dtype)
        flops = GRAFTS * cost.flops(each, ENTRIES)
        moved = GRAFTS * cost.bytes_moved(each, ENTRIES, WIDTH, itemsize=dtype.itemsize)
        name = f"sparse, {rows} rows of {GRAFTS} grafts, 1%"
        yield Case(name, partial(sparse, x, y, values, index, Segments(tuple(items))), flops, moved)


if __name__ == "__main__":
    show(cases())
