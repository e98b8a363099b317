"""The branch op's Triton programs: each does one tile of one segment, accumulating in float32 (float64 stays float64).

Nothing is summed across programs, so results do not depend on the order they run in; rows and ranks outside the segment
are masked, never read.
"""

# Triton reads no annotation but constexpr, and its decorator is untyped.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def shrink_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    hidden_ptr,
    out_ptr,
    table_ptr,
    scales_ptr,
    tiles_ptr,
    x_stride,
    weight_stride,
    depth,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ACT: tl.constexpr,
    BIASED: tl.constexpr,
    BACKWARD: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[s][t, r] = sum_d x[start + t, d] weight[first + r, d], BIASED: plus bias[first + r], BACKWARD: times
    scale act'(hidden[s][t, r])."""
    segment, row_tile, rank_tile = tile_of(tiles_ptr)
    start, rows, first, size, offset = segment_of(table_ptr, segment)
    t = row_tile * HEIGHT + tl.arange(0, HEIGHT)
    r = rank_tile * WIDTH + tl.arange(0, WIDTH)
    x_row = x_ptr + (start + t)[:, None] * x_stride
    weight_row = weight_ptr + (first + r)[None, :] * weight_stride
    acc = tl.full((HEIGHT, WIDTH), 0, ACC)
    for low in range(0, depth, DEPTH):
        d = low + tl.arange(0, DEPTH)
        x = tl.load(x_row + d[None, :], mask=(t < rows)[:, None] & (d < depth)[None, :], other=0)
        weight = tl.load(weight_row + d[:, None], mask=(r < size)[None, :] & (d < depth)[:, None], other=0)
        acc = tl.dot(x, weight, acc, input_precision="ieee", out_dtype=ACC)
    block = offset + t[:, None] * size + r[None, :]
    inside = (t < rows)[:, None] & (r < size)[None, :]
    if BIASED:
        acc += tl.load(bias_ptr + first + r, mask=r < size, other=0).to(ACC)[None, :]
    if BACKWARD:
        hidden = tl.load(hidden_ptr + block, mask=inside, other=0).to(ACC)
        acc = _activation_backward(acc * tl.load(scales_ptr + segment).to(ACC), hidden, ACT)
    tl.store(out_ptr + block, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def expand_kernel(
    hidden_ptr,
    weight_ptr,
    out_ptr,
    table_ptr,
    scales_ptr,
    tiles_ptr,
    weight_stride,
    out_stride,
    features,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    ACT: tl.constexpr,
    SCALED: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[start + t, d] += sum_r f(hidden[s][t, r]) weight[first + r, d], f = scale act(.) if SCALED."""
    segment, row_tile, _ = tile_of(tiles_ptr)
    start, rows, first, size, offset = segment_of(table_ptr, segment)
    t = row_tile * HEIGHT + tl.arange(0, HEIGHT)
    d = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    scale = tl.load(scales_ptr + segment).to(ACC)
    acc = tl.full((HEIGHT, FEATURES), 0, ACC)
    for low in range(0, size, WIDTH):
        r = low + tl.arange(0, WIDTH)
        hidden = tl.load(
            hidden_ptr + offset + t[:, None] * size + r[None, :],
            mask=(t < rows)[:, None] & (r < size)[None, :],
            other=0,
        )
        if SCALED:
            hidden = (activated(hidden.to(ACC), ACT) * scale).to(hidden_ptr.dtype.element_ty)
        weight = tl.load(
            weight_ptr + (first + r)[:, None] * weight_stride + d[None, :],
            mask=(r < size)[:, None] & (d < features)[None, :],
            other=0,
        )
        acc = tl.dot(hidden, weight, acc, input_precision="ieee", out_dtype=ACC)
    out = out_ptr + (start + t)[:, None] * out_stride + d[None, :]
    inside = (t < rows)[:, None] & (d < features)[None, :]
    acc += tl.load(out, mask=inside, other=0).to(ACC)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def outer_kernel(
    hidden_ptr,
    x_ptr,
    out_ptr,
    table_ptr,
    scales_ptr,
    tiles_ptr,
    x_stride,
    out_stride,
    features,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    ACT: tl.constexpr,
    SCALED: tl.constexpr,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[first + r, d] = (ADD: +=) sum_t f(hidden[s][t, r]) x[start + t, d]; features take the product's long side."""
    segment, _, rank_tile = tile_of(tiles_ptr)
    start, rows, first, size, offset = segment_of(table_ptr, segment)
    r = rank_tile * WIDTH + tl.arange(0, WIDTH)
    d = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    scale = tl.load(scales_ptr + segment).to(ACC)
    acc = tl.full((FEATURES, WIDTH), 0, ACC)
    for low in range(0, rows, HEIGHT):
        t = low + tl.arange(0, HEIGHT)
        hidden = tl.load(
            hidden_ptr + offset + t[:, None] * size + r[None, :],
            mask=(t < rows)[:, None] & (r < size)[None, :],
            other=0,
        )
        if SCALED:
            hidden = (activated(hidden.to(ACC), ACT) * scale).to(hidden_ptr.dtype.element_ty)
        x = tl.load(
            x_ptr + (start + t)[None, :] * x_stride + d[:, None],
            mask=(t < rows)[None, :] & (d < features)[:, None],
            other=0,
        )
        acc = tl.dot(x, hidden, acc, input_precision="ieee", out_dtype=ACC)
    out = out_ptr + (first + r)[None, :] * out_stride + d[:, None]
    inside = (r < size)[None, :] & (d < features)[:, None]
    if ADD:
        acc += tl.load(out, mask=inside, other=0).to(ACC)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def columns_kernel(
    hidden_ptr,
    out_ptr,
    table_ptr,
    tiles_ptr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[first + r] = (ADD: +=) sum_t hidden[s][t, r]."""
    segment, _, rank_tile = tile_of(tiles_ptr)
    _, rows, first, size, offset = segment_of(table_ptr, segment)
    r = rank_tile * WIDTH + tl.arange(0, WIDTH)
    sums = tl.full((HEIGHT, WIDTH), 0, ACC)
    for low in range(0, rows, HEIGHT):
        t = low + tl.arange(0, HEIGHT)
        block = hidden_ptr + offset + t[:, None] * size + r[None, :]
        sums += tl.load(block, mask=(t < rows)[:, None] & (r < size)[None, :], other=0).to(ACC)
    total = tl.sum(sums, 0)
    if ADD:
        total += tl.load(out_ptr + first + r, mask=r < size, other=0).to(ACC)
    tl.store(out_ptr + first + r, total.to(out_ptr.dtype.element_ty), mask=r < size)


@triton.jit
def tile_of(tiles_ptr):
    """(segment, row tile, rank tile) of this program, int64, so that every address built from them is."""
    tile = tiles_ptr + tl.program_id(0).to(tl.int64) * 3
    return tl.load(tile).to(tl.int64), tl.load(tile + 1).to(tl.int64), tl.load(tile + 2).to(tl.int64)


@triton.jit
def segment_of(table_ptr, segment):
    """(start, rows, first, size, block offset), int64."""
    row = table_ptr + segment * 5
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def activated(h, ACT: tl.constexpr):
    if ACT == "relu":
        h = tl.where(h > 0, h, tl.where(h == h, 0, h))
    elif ACT == "gelu":
        h = h * _normal(h)
    elif ACT == "silu":
        h = h * _logistic(h)
    elif ACT == "tanh":
        h = _tanh(h)
    else:
        tl.static_assert(ACT == "identity")
    return h


@triton.jit
def _activation_backward(grad, h, ACT: tl.constexpr):
    """grad * act'(h)."""
    if ACT == "relu":
        grad = tl.where(h > 0, grad, 0)
    elif ACT == "gelu":
        grad = grad * (_normal(h) + h * tl.exp(-0.5 * h * h) * 0.3989422804014327)
    elif ACT == "silu":
        grad = grad * _logistic(h) * (1 + h * (1 - _logistic(h)))
    elif ACT == "tanh":
        grad = grad * (1 - _tanh(h) * _tanh(h))
    else:
        tl.static_assert(ACT == "identity")
    return grad


@triton.jit
def _normal(h):
    """The normal distribution function."""
    return 0.5 * (1 + tl.math.erf(h * 0.7071067811865476))


@triton.jit
def _logistic(h):
    return 1 / (1 + tl.exp(-h))


@triton.jit
def _tanh(h):
    """By exponentials; near 0, where these cancel, by the series (relative error below 1e-7 in float32)."""
    e = tl.exp(-2 * tl.abs(h))
    far = tl.where(h < 0, -1, 1) * (1 - e) / (1 + e)
    q = h * h
    near = h * (1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
    return tl.where(tl.abs(h) < 0.2, near, far)
