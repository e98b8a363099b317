"""The norm op's Triton programs: A A^T by tiles, then the norms of a tile of output rows from it."""

# Triton reads no annotation but constexpr, and its decorator is untyped.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def gram_kernel(
    a_ptr,
    gram_ptr,
    rank,
    depth,
    a_stride,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """gram[r, k] = sum_d A[r, d] A[k, d]."""
    r = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    k = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    acc = tl.full((WIDTH, WIDTH), 0, ACC)
    for low in range(0, depth, DEPTH):
        d = low + tl.arange(0, DEPTH)
        left = tl.load(
            a_ptr + r[:, None] * a_stride + d[None, :], mask=(r < rank)[:, None] & (d < depth)[None, :], other=0
        )
        right = tl.load(
            a_ptr + k[None, :] * a_stride + d[:, None], mask=(k < rank)[None, :] & (d < depth)[:, None], other=0
        )
        acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(gram_ptr + r[:, None] * rank + k[None, :], acc, mask=(r < rank)[:, None] & (k < rank)[None, :])


@triton.jit
def norm_kernel(
    square_ptr,
    cross_ptr,
    gram_ptr,
    b_ptr,
    out_ptr,
    scales_ptr,
    rank,
    features,
    cross_stride,
    b_stride,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[o] = sqrt(square[o] + 2 s sum_r cross[r, o] B[r, o] + s^2 sum_rk B[r, o] gram[r, k] B[k, o])."""
    o = tl.program_id(0).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    scale = tl.load(scales_ptr).to(ACC)
    linear = tl.full((FEATURES,), 0, ACC)
    quadratic = tl.full((FEATURES,), 0, ACC)
    for first in range(0, rank, WIDTH):
        r = first + tl.arange(0, WIDTH)
        own = (r < rank)[:, None] & (o < features)[None, :]
        b = tl.load(b_ptr + r[:, None].to(tl.int64) * b_stride + o[None, :], mask=own, other=0).to(ACC)
        cross = tl.load(cross_ptr + r[:, None].to(tl.int64) * cross_stride + o[None, :], mask=own, other=0).to(ACC)
        acc = tl.full((WIDTH, FEATURES), 0, ACC)
        for low in range(0, rank, WIDTH):
            k = low + tl.arange(0, WIDTH)
            gram = tl.load(
                gram_ptr + r[:, None] * rank + k[None, :], mask=(r < rank)[:, None] & (k < rank)[None, :], other=0
            )
            other = (k < rank)[:, None] & (o < features)[None, :]
            right = tl.load(b_ptr + k[:, None].to(tl.int64) * b_stride + o[None, :], mask=other, other=0).to(ACC)
            acc = tl.dot(gram, right, acc, input_precision=PRECISION, out_dtype=ACC)
        linear += tl.sum(cross * b, 0)
        quadratic += tl.sum(acc * b, 0)
    total = tl.load(square_ptr + o, mask=o < features, other=0) + 2 * scale * linear + scale * scale * quadratic
    tl.store(out_ptr + o, tl.sqrt(tl.where(total < 0, 0, total)), mask=o < features)
