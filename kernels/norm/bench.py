"""python -m polygraft.kernels.norm.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from polygraft.kernels.common.bench import Case, show
from polygraft.kernels.norm import cost
from polygraft.kernels.norm.op import row_norm

WIDTH = 1536


def cases(dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    for rank in (8, 16, 64):
        A, B = torch.randn(rank, WIDTH).to(dtype), torch.randn(rank, WIDTH).to(dtype)
        square, cross = torch.rand(WIDTH) + rank, torch.randn(rank, WIDTH)
        gram, norms = cost.gram(rank, WIDTH, itemsize=dtype.itemsize), cost.norms(rank, WIDTH, itemsize=dtype.itemsize)
        work = gram[0] + norms[0], gram[1] + norms[1]
        yield Case(f"norm, rank {rank}, A W^T given", partial(row_norm, square, cross, A, B, 1.0), *work)


if __name__ == "__main__":
    show(cases())
