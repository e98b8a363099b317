"""The norm op's programs as launches specialise them for bf16 factors."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from polygraft.kernels.common.aot import Tuned
from polygraft.kernels.norm import cost
from polygraft.kernels.norm.gpu import DEPTH, FEATURES, WIDTHS
from polygraft.kernels.norm.programs import gram_kernel, norm_kernel

WIDE = 4096  # in and out


def tuned() -> Iterator[Tuned]:
    pointers = dict.fromkeys(("square_ptr", "gram_ptr", "out_ptr"), "*fp32")
    for rank in WIDTHS:
        shared = {"WIDTH": rank, "ACC": tl.float32, "PRECISION": "tf32x3"}
        work = f"one graft of rank {rank}, {WIDE} wide"
        for name, program, constants, part in (
            ("gram", gram_kernel, {"DEPTH": DEPTH}, cost.gram(rank, WIDE, itemsize=2)),
            ("norm", norm_kernel, {"FEATURES": FEATURES}, cost.norms(rank, WIDE, itemsize=2)),
        ):
            yield Tuned(f"{name}, rank {rank}", program, {**constants, **shared}, work, *part, pointers)
