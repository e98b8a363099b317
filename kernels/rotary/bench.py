"""python -m polygraft.kernels.rotary.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from polygraft.kernels.common.bench import Case, show
from polygraft.kernels.rotary import cost
from polygraft.kernels.rotary.op import rotary_write

HEADS, KV_HEADS, HEAD_DIM, SLOTS = 9, 3, 64, 4096


def cases() -> Iterator[Case]:
    widths = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    cache = torch.zeros(SLOTS, 2, KV_HEADS * HEAD_DIM, dtype=torch.bfloat16)
    for rows in (16, 256):
        q, k, v = torch.randn(rows, sum(widths)).bfloat16().split_with_sizes(widths, dim=1)
        cos, sin = torch.randn(2, rows, HEAD_DIM).bfloat16()
        shape = rows, HEADS, KV_HEADS, HEAD_DIM
        call = partial(rotary_write, (q, k, v), (cos, sin), cache, torch.arange(rows) * 7, HEADS)
        yield Case(
            f"rotary and page write, {rows} rows", call, cost.flops(*shape), cost.bytes_moved(*shape, itemsize=2)
        )


if __name__ == "__main__":
    show(cases())
