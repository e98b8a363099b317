"""python -m polygraft.kernels.kv.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from polygraft.kernels.common.bench import Case, show
from polygraft.kernels.kv import cost
from polygraft.kernels.kv.layout import Layout, Sequence
from polygraft.kernels.kv.op import attend
from polygraft.kernels.kv.scores import Scores

HEADS, KV_HEADS, HEAD, GRAFTS = 9, 3, 64, 8


def cases(dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    for length, prefix in ((64, 0), (64, 10), (256, 10)):
        rows, stack = GRAFTS * length, GRAFTS * prefix
        sequences = tuple(Sequence(i * length, length, i * prefix, prefix) for i in range(GRAFTS))
        q, k, v, pk, pv = (
            torch.randn(count, heads * HEAD).to(dtype)
            for count, heads in ((rows, HEADS), *[(rows, KV_HEADS)] * 2, *[(stack, KV_HEADS)] * 2)
        )
        layout = Layout(sequences, rows, stack, HEADS, KV_HEADS)
        shapes = [(length, prefix)] * GRAFTS
        moved = cost.bytes_moved(shapes, HEADS * HEAD, KV_HEADS * HEAD, itemsize=dtype.itemsize)
        name = f"kv, {GRAFTS} sequences of {length} after {prefix}"
        call = (q, k, v, pk, pv, layout, Scores(HEAD**-0.5))
        yield Case(name, partial(attend, *call), cost.flops(shapes, HEADS, HEAD), moved)


if __name__ == "__main__":
    show(cases())
