"""The sparse op's Triton programs. What an output sums is its own segment's entries in stack order, one after the
other in one program; nothing is summed across programs."""

# Triton reads no annotation but constexpr, and its decorator is untyped.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from polygraft.kernels.branch.programs import segment_of, tile_of


@triton.jit
def meet_kernel(
    source_ptr,
    v_ptr,
    out_ptr,
    entry_ptr,
    other_ptr,
    bounds_ptr,
    ranges_ptr,
    table_ptr,
    scales_ptr,
    tiles_ptr,
    source_stride,
    out_stride,
    features,
    HEIGHT: tl.constexpr,
    FEATURES: tl.constexpr,
    ENTRIES: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[start + t, o] += scale sum_k f(t, k) over the segment's stack rows k whose place is o.

    ENTRIES: f = v[k] source[start + t, other(k)]; else f = source[s][t, k - first], blocks as `shrink` leaves them.
    A program does a tile of rows and places; its loop is as long as the longest list of these.
    """
    segment, row_tile, _ = tile_of(tiles_ptr)
    start, rows, first, size, offset = segment_of(table_ptr, segment)
    t = row_tile * HEIGHT + tl.arange(0, HEIGHT)
    o = tl.program_id(1).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    own, real = (t < rows)[:, None], o < features
    bounds = bounds_ptr + tl.load(ranges_ptr + segment) * 2 * features + o
    low = tl.load(bounds, mask=real, other=0)
    count = tl.load(bounds + features, mask=real, other=0) - low
    if ENTRIES:
        row = source_ptr + (start + t)[:, None] * source_stride
    else:
        row = source_ptr + offset + t[:, None] * size - first
    acc = tl.full((HEIGHT, FEATURES), 0, ACC)
    for j in range(0, tl.max(count, 0)):
        live = j < count
        entry = tl.load(entry_ptr + low + j, mask=live, other=0)
        if ENTRIES:
            v = tl.load(v_ptr + entry, mask=live, other=0).to(ACC)[None, :]
            at = tl.load(other_ptr + low + j, mask=live, other=0)
            acc += v * tl.load(row + at[None, :], mask=own & live[None, :], other=0).to(ACC)
        else:
            acc += tl.load(row + entry[None, :], mask=own & live[None, :], other=0).to(ACC)
    out = out_ptr + (start + t)[:, None] * out_stride + o[None, :]
    inside = own & (count > 0)[None, :]
    acc = acc * tl.load(scales_ptr + segment).to(ACC) + tl.load(out, mask=inside, other=0).to(ACC)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def values_kernel(
    x_ptr,
    grad_ptr,
    i_ptr,
    out_ptr,
    segments_ptr,
    table_ptr,
    scales_ptr,
    x_stride,
    grad_stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[k] = (ADD: +=) scale sum_t grad[start + t, i[k, 0]] x[start + t, i[k, 1]]."""
    segment = tl.load(segments_ptr + tl.program_id(0))
    start, rows, first, size, _ = segment_of(table_ptr, segment)
    place = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    live, k = place < size, first + place
    a = tl.load(i_ptr + 2 * k + 1, mask=live, other=0)[None, :]
    b = tl.load(i_ptr + 2 * k, mask=live, other=0)[None, :]
    sums = tl.full((HEIGHT, WIDTH), 0, ACC)
    for low in range(0, tl.where(tl.program_id(1) * WIDTH < size, rows, 0), HEIGHT):
        t = low + tl.arange(0, HEIGHT)[:, None]
        inside = (t < rows) & live[None, :]
        x = tl.load(x_ptr + (start + t) * x_stride + a, mask=inside, other=0).to(ACC)
        sums += x * tl.load(grad_ptr + (start + t) * grad_stride + b, mask=inside, other=0).to(ACC)
    total = tl.sum(sums, 0) * tl.load(scales_ptr + segment).to(ACC)
    if ADD:
        total += tl.load(out_ptr + k, mask=live, other=0).to(ACC)
    tl.store(out_ptr + k, total.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def columns_kernel(
    source_ptr,
    i_ptr,
    out_ptr,
    table_ptr,
    tiles_ptr,
    source_stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out[s][t, k - first] = source[start + t, i[k]]: blocks of the columns that the segment's stack rows are at."""
    segment, row_tile, rank_tile = tile_of(tiles_ptr)
    start, rows, first, size, offset = segment_of(table_ptr, segment)
    t = (row_tile * HEIGHT + tl.arange(0, HEIGHT))[:, None]
    r = rank_tile * WIDTH + tl.arange(0, WIDTH)
    at = tl.load(i_ptr + first + r, mask=r < size, other=0)[None, :]
    inside = (t < rows) & (r < size)[None, :]
    loaded = tl.load(source_ptr + (start + t) * source_stride + at, mask=inside, other=0)
    tl.store(out_ptr + offset + t * size + r[None, :], loaded, mask=inside)
