"""python -m polygraft.kernels.cross_entropy.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from polygraft.kernels.common.bench import Case, show
from polygraft.kernels.cross_entropy import cost
from polygraft.kernels.cross_entropy.op import replace_by_slope

WIDTH = 49152


def cases() -> Iterator[Case]:
    for rows in (16, 128):
        logits = torch.randn(rows, WIDTH).bfloat16()
        call = partial(replace_by_slope, logits, torch.arange(rows), torch.ones(rows))
        yield Case(
            f"cross_entropy, {rows} rows", call, cost.flops(rows, WIDTH), cost.bytes_moved(rows, WIDTH, itemsize=2)
        )


if __name__ == "__main__":
    show(cases())
