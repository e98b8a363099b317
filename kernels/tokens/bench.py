"""python -m polygraft.kernels.tokens.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from polygraft.kernels.common.bench import Case, show
from polygraft.kernels.tokens import cost
from polygraft.kernels.tokens.op import tokens

WIDTH, PROMPT, GRAFTS = 576, 20, 8


def cases(dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    p = torch.randn(GRAFTS * PROMPT, WIDTH)
    for rows in (256, 1024):
        x, each = torch.randn(rows, WIDTH).to(dtype), rows // GRAFTS
        index = torch.full((GRAFTS, each), -1)
        index[:, :PROMPT] = torch.arange(GRAFTS * PROMPT).view(GRAFTS, PROMPT)
        work = cost.flops(len(p), WIDTH), cost.bytes_moved(len(p), WIDTH, itemsize=dtype.itemsize)
        for add in (False, True):
            name = f"tokens, {len(p)} of {rows} rows {'added' if add else 'placed'}"
            yield Case(name, partial(tokens, x, p, index.flatten(), add), *work)


if __name__ == "__main__":
    show(cases())
