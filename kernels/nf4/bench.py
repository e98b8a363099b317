"""python -m polygraft.kernels.nf4.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from polygraft.kernels.common.bench import Case, show
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.nf4 import cost
from polygraft.kernels.nf4.op import linear

WIDTH, RANK = 576, 16


def cases(dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    codes = torch.randint(0, 256, (WIDTH, WIDTH // 2), dtype=torch.uint8)
    absmax = torch.rand(WIDTH, WIDTH // cost.BLOCK)
    A, B = torch.randn(RANK, WIDTH).to(dtype), torch.randn(RANK, WIDTH).to(dtype)
    for rows in (16, 512):
        x, segments = torch.randn(rows, WIDTH).to(dtype), Segments((Segment(0, rows, 0, RANK),))
        work = cost.flops(rows, WIDTH, WIDTH), cost.bytes_moved(rows, WIDTH, WIDTH, itemsize=dtype.itemsize)
        yield Case(f"nf4, {rows} rows", partial(linear, x, codes, absmax, A, B, segments), *work)


if __name__ == "__main__":
    show(cases())
