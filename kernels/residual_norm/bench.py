"""python -m polygraft.kernels.residual_norm.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from polygraft.kernels.common.bench import Case, show
from polygraft.kernels.residual_norm import cost
from polygraft.kernels.residual_norm.op import Norm, residual_norm

WIDTH, EPS = 576, 1e-5


def cases() -> Iterator[Case]:
    norm = Norm(torch.randn(WIDTH).bfloat16(), None, EPS, centred=False)
    for rows in (16, 512):
        x, update = (torch.randn(rows, WIDTH).bfloat16() for _ in range(2))
        work = cost.flops(rows, WIDTH), cost.bytes_moved(rows, WIDTH, itemsize=2)
        yield Case(f"residual and RMS norm, {rows} rows", partial(residual_norm, x, update, norm), *work)


if __name__ == "__main__":
    show(cases())
