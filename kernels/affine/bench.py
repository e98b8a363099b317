"""python -m polygraft.kernels.affine.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from polygraft.kernels.affine import cost
from polygraft.kernels.affine.op import affine
from polygraft.kernels.common.bench import Case, show
from polygraft.kernels.common.segments import Segment, Segments

WIDTH = 1536


def cases(dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    for rows, grafts in ((16, 8), (512, 2), (512, 8)):
        each = rows // grafts
        segments = Segments(tuple(Segment(i * each, (i + 1) * each, i, i + 1) for i in range(grafts)))
        y, g, b = torch.randn(rows, WIDTH).to(dtype), torch.randn(grafts, WIDTH), torch.randn(grafts, WIDTH)
        work = cost.flops(rows, WIDTH), cost.bytes_moved(rows, WIDTH, grafts, itemsize=dtype.itemsize)
        yield Case(f"affine, {rows} rows of {grafts} grafts", partial(affine, y, g, b, segments), *work)


if __name__ == "__main__":
    show(cases())
