"""The kv op's programs as launches specialise them for bf16, at the heads of an 8B Llama."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from polygraft.kernels.common.aot import Tuned
from polygraft.kernels.kv import cost
from polygraft.kernels.kv.programs import attend_kernel, key_gradient_kernel, paged_kernel, query_gradient_kernel
from polygraft.kernels.kv.tiles import HEIGHTS, KEYS

HEADS, KV_HEADS, HEAD = 32, 8, 128
LENGTHS, PREFIX, DECODING, CONTEXT = [512] * 8, 16, 16, 1024


def tuned() -> Iterator[Tuned]:
    whole = [(length, PREFIX) for length in LENGTHS]
    widths = HEADS * HEAD, KV_HEADS * HEAD
    flops, moved = cost.flops(whole, HEADS, HEAD), cost.bytes_moved(whole, *widths, itemsize=2)
    constants = {"SCALING": HEAD**-0.5, "CAP": 0.0, "KEYS": KEYS, "HEAD": HEAD, "ACC": tl.float32}
    pointers = {"lse_ptr": "*fp32", "sums_ptr": "*fp32", "inner_ptr": "*fp32", "blocks_ptr": "*i64"}
    work = f"{len(LENGTHS)} sequences of {LENGTHS[0]} after {PREFIX}, {HEADS} heads on {KV_HEADS}"
    for height in HEIGHTS:
        tile = {**constants, "HEIGHT": height}
        yield Tuned(f"attend, {height} rows", attend_kernel, tile, work, flops, moved, pointers)
        # Scores again, dout v^T and ds k: three products where the forward has two; keys' gradients have four.
        yield Tuned(f"dq, {height} rows", query_gradient_kernel, tile, work, 3 * flops // 2, 2 * moved, pointers)
    tile = {**constants, "HEIGHT": HEIGHTS[0], "PREFIX": False}
    yield Tuned("dk and dv", key_gradient_kernel, tile, work, 2 * flops, 2 * moved, pointers)
    decoding = [(1, CONTEXT)] * DECODING
    flops, moved = cost.flops(decoding, HEADS, HEAD), cost.bytes_moved(decoding, *widths, itemsize=2)
    work = f"{DECODING} sequences decode after {CONTEXT}, {HEADS} heads on {KV_HEADS}"
    tile = {**constants, "HEIGHT": HEIGHTS[0], "BLOCK": 16}
    yield Tuned("paged, 16 rows", paged_kernel, tile, work, flops, moved, pointers)
