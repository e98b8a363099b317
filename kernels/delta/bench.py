"""python -m polygraft.kernels.delta.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from polygraft.kernels.common.bench import Case, show
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.delta import cost
from polygraft.kernels.delta.op import delta

WIDTH, RANK, GRAFTS = 576, 8, 4


def product(numbers_N1: Tensor) -> Tensor:
    """dW = (a b) * (c d), LoHa's."""
    a, b, c, d = numbers_N1.view(4, RANK, WIDTH).unbind()
    return (a.T @ b).mul(c.T @ d)


def cases(dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    size = 4 * RANK * WIDTH
    numbers = torch.randn(GRAFTS * size, 1)
    generators = {i * size: product for i in range(GRAFTS)}
    for rows in (16, 512):
        each = rows // GRAFTS
        segments = Segments(tuple(Segment(i * each, (i + 1) * each, i * size, (i + 1) * size) for i in range(GRAFTS)))
        x, y = torch.randn(rows, WIDTH).to(dtype), torch.zeros(rows, WIDTH, dtype=dtype)
        moved = GRAFTS * cost.bytes_moved(each, WIDTH, WIDTH, itemsize=dtype.itemsize)
        call = (x, y, numbers, segments, generators)
        name = f"delta, {rows} rows of {GRAFTS} grafts"
        yield Case(name, partial(delta, *call), cost.flops(rows, WIDTH, WIDTH), moved)


if __name__ == "__main__":
    show(cases())
