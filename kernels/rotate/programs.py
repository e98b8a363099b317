"""The rotate op's Triton programs for blocks: a product of a few of one segment's rows with one block of its graft."""

# Triton reads no annotation but constexpr, and its decorator is untyped.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from polygraft.kernels.branch.programs import segment_of, tile_of


@triton.jit
def turn_kernel(
    x_ptr,
    d_ptr,
    out_ptr,
    channels_ptr,
    table_ptr,
    tiles_ptr,
    x_stride,
    out_stride,
    block,
    base,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[start + t, c(j)] = x[start + t, c(j)] + sum_i x[start + t, c(i)] D[i, j] for i and j in one block, c being
    the channel at a place; TRANSPOSED: D[j, i]. A graft's blocks of this stage begin `base` rows after its first."""
    segment, row_tile, _ = tile_of(tiles_ptr)
    start, rows, first, _, _ = segment_of(table_ptr, segment)
    tiles = tl.cdiv(block, WIDTH)
    place = (tl.program_id(1) // tiles).to(tl.int64) * block
    t = row_tile * HEIGHT + tl.arange(0, HEIGHT)
    j = (tl.program_id(1) % tiles) * WIDTH + tl.arange(0, WIDTH)
    own, real = (t < rows)[:, None], (j < block)[None, :]
    to = tl.load(channels_ptr + place + j, mask=j < block, other=0)[None, :]
    row = x_ptr + (start + t)[:, None] * x_stride
    square = d_ptr + (first + base + place) * block
    acc = tl.load(row + to, mask=own & real, other=0).to(ACC)
    for low in range(0, block, WIDTH):
        i = low + tl.arange(0, WIDTH)
        of = tl.load(channels_ptr + place + i, mask=i < block, other=0)[None, :]
        x = tl.load(row + of, mask=own & (i < block)[None, :], other=0).to(ACC)
        if TRANSPOSED:
            d = tl.load(square + j[None, :] * block + i[:, None], mask=(i < block)[:, None] & real, other=0)
        else:
            d = tl.load(square + i[:, None] * block + j[None, :], mask=(i < block)[:, None] & real, other=0)
        acc = tl.dot(x, d, acc, input_precision=PRECISION, out_dtype=ACC)
    out = out_ptr + (start + t)[:, None] * out_stride + to
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=own & real)


@triton.jit
def squares_kernel(
    x_ptr,
    grad_ptr,
    out_ptr,
    channels_ptr,
    segments_ptr,
    table_ptr,
    x_stride,
    grad_stride,
    block,
    base,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """out's block [i, j] += sum_t x[start + t, c(i)] grad[start + t, c(j)]."""
    segment = tl.load(segments_ptr + tl.program_id(0))
    start, rows, first, _, _ = segment_of(table_ptr, segment)
    tiles = tl.cdiv(block, WIDTH)
    place = (tl.program_id(1) // (tiles * tiles)).to(tl.int64) * block
    i = (tl.program_id(1) // tiles % tiles) * WIDTH + tl.arange(0, WIDTH)
    j = (tl.program_id(1) % tiles) * WIDTH + tl.arange(0, WIDTH)
    of = tl.load(channels_ptr + place + i, mask=i < block, other=0)[:, None]
    to = tl.load(channels_ptr + place + j, mask=j < block, other=0)[None, :]
    acc = tl.full((WIDTH, WIDTH), 0, ACC)
    for low in range(0, rows, HEIGHT):
        t = low + tl.arange(0, HEIGHT)
        x_at, grad_at = x_ptr + (start + t)[None, :] * x_stride + of, grad_ptr + (start + t)[:, None] * grad_stride + to
        x = tl.load(x_at, mask=(i < block)[:, None] & (t < rows)[None, :], other=0).to(ACC)
        grad = tl.load(grad_at, mask=(t < rows)[:, None] & (j < block)[None, :], other=0).to(ACC)
        acc = tl.dot(x, grad, acc, input_precision=PRECISION, out_dtype=ACC)
    out = out_ptr + (first + base + place) * block + i[:, None] * block + j[None, :]
    inside = (i < block)[:, None] & (j < block)[None, :]
    tl.store(out, acc + tl.load(out, mask=inside, other=0), mask=inside)
