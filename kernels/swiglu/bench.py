"""python -m polygraft.kernels.swiglu.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from polygraft.kernels.common.bench import Case, show
from polygraft.kernels.swiglu import cost
from polygraft.kernels.swiglu.op import swiglu

WIDTH = 1536


def cases() -> Iterator[Case]:
    for rows in (16, 512):
        gate, up = torch.randn(rows, 2 * WIDTH).bfloat16().chunk(2, dim=1)
        work = cost.flops(rows, WIDTH), cost.bytes_moved(rows, WIDTH, itemsize=2)
        yield Case(f"swiglu, {rows} rows", partial(swiglu, gate, up), *work)


if __name__ == "__main__":
    show(cases())
