"""The nf4 op's Triton program: a tile of one segment's rows, W dequantised as it is met, the branch's second product on
top before the tile is written."""

# Triton reads no annotation but constexpr, and its decorator is untyped.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from polygraft.kernels.branch.programs import activated, segment_of, tile_of


@triton.jit
def linear_kernel(
    x_ptr,
    codes_ptr,
    absmax_ptr,
    levels_ptr,
    hidden_ptr,
    b_ptr,
    out_ptr,
    table_ptr,
    scales_ptr,
    tiles_ptr,
    x_stride,
    b_stride,
    depth,
    features,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[start + t, o] = sum_i x[start + t, i] W[o, i] + sum_r scale act(hidden[s][t, r]) B[first + r, o].

    A block of W is two products: even columns, in the high nibbles, and odd ones.
    """
    segment, row_tile, _ = tile_of(tiles_ptr)
    start, rows, first, size, offset = segment_of(table_ptr, segment)
    t = row_tile * HEIGHT + tl.arange(0, HEIGHT)
    o = tl.program_id(1).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    half = tl.arange(0, BLOCK // 2)
    own, real = (t < rows)[:, None], (o < features)[None, :]
    x_at = x_ptr + (start + t)[:, None] * x_stride + 2 * half[None, :]
    codes_at = codes_ptr + o[None, :] * (depth // 2) + half[:, None]
    acc = tl.full((HEIGHT, FEATURES), 0, ACC)
    for low in range(0, depth, BLOCK):
        codes = tl.load(codes_at + low // 2, mask=real & (half >= 0)[:, None], other=0).to(tl.int32)
        absmax = tl.load(absmax_ptr + o * (depth // BLOCK) + low // BLOCK, mask=o < features, other=0)[None, :]
        even = tl.load(x_at + low, mask=own & (half >= 0)[None, :], other=0)
        odd = tl.load(x_at + low + 1, mask=own & (half >= 0)[None, :], other=0)
        high = (tl.load(levels_ptr + (codes >> 4)) * absmax).to(even.dtype)
        acc = tl.dot(even, high, acc, input_precision="ieee", out_dtype=ACC)
        small = (tl.load(levels_ptr + (codes & 15)) * absmax).to(odd.dtype)
        acc = tl.dot(odd, small, acc, input_precision="ieee", out_dtype=ACC)
    scale = tl.load(scales_ptr + segment).to(ACC)
    for low in range(0, size, WIDTH):
        r = low + tl.arange(0, WIDTH)
        block = hidden_ptr + offset + t[:, None] * size + r[None, :]
        hidden = tl.load(block, mask=own & (r < size)[None, :], other=0)
        up = (activated(hidden.to(ACC), ACT) * scale).to(hidden.dtype)
        b = tl.load(b_ptr + (first + r)[:, None] * b_stride + o[None, :], mask=(r < size)[:, None] & real, other=0)
        acc = tl.dot(up, b, acc, input_precision="ieee", out_dtype=ACC)
    out = out_ptr + (start + t)[:, None] * features + o[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=own & real)
