"""python -m polygraft.kernels.branch.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from polygraft.kernels.branch import cost
from polygraft.kernels.branch.op import serve_branch_
from polygraft.kernels.common.bench import Case, show
from polygraft.kernels.common.segments import Segment, Segments

GRAFTS, WIDTH = 8, 576


def cases(dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    for rows in (16, 512):
        for ranks in ([16] * GRAFTS, [4, 8, 16, 32] * 2):
            items, first = [], 0
            for i, rank in enumerate(ranks):
                items.append(Segment(i * rows // GRAFTS, (i + 1) * rows // GRAFTS, first, first + rank, 2.0))
                first += rank
            x, y = torch.randn(rows, WIDTH).to(dtype), torch.zeros(rows, WIDTH, dtype=dtype)
            A, B = torch.randn(first, WIDTH).to(dtype), torch.zeros(first, WIDTH, dtype=dtype)
            shapes = [(s.rows, s.size) for s in items]
            work = cost.flops(shapes, WIDTH, WIDTH), cost.bytes_moved(shapes, WIDTH, WIDTH, itemsize=dtype.itemsize)
            segments = Segments(tuple(items))
            name = f"branch, {rows} rows, ranks {sorted(set(ranks))}"
            yield Case(name, partial(serve_branch_, y, x, A, B, segments, "identity"), *work)


if __name__ == "__main__":
    show(cases())
