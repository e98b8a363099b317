"""python -m polygraft.kernels.copies.bench"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from polygraft.kernels.common.bench import Case, show
from polygraft.kernels.copies import cost
from polygraft.kernels.copies.op import ready

COUNT, SIZE = 420, 16 * 576  # as a LoRA of SmolLM2 has them


def cases() -> Iterator[Case]:
    master = list(torch.randn(COUNT, SIZE))
    stacks = [x.bfloat16() for x in master]
    elements = COUNT * SIZE
    for name, into, of, sizes in (
        ("float32 to bf16", stacks, master, (4, 2)),
        ("bf16 to float32", master, stacks, (2, 4)),
    ):
        moved = cost.bytes_moved(elements, read=sizes[0], written=sizes[1])
        yield Case(f"copies, {name}", ready(into, of), cost.flops(elements), moved)


if __name__ == "__main__":
    show(cases())
