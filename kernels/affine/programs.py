"""The affine op's Triton programs. Rows outside every segment pass unchanged; sums stay inside one graft's rows."""

# Triton reads no annotation but constexpr, and its decorator is untyped.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def affine_kernel(
    y_ptr,
    g_ptr,
    b_ptr,
    out_ptr,
    index_ptr,
    rows,
    width,
    absent,
    y_stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[t] = y[t] g[j] + b[j] with j = index[t], rounded once; y[t] where j is `absent`."""
    t = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    j = tl.load(index_ptr + t, mask=t < rows, other=absent)
    inside = (t < rows)[:, None] & (d < width)[None, :]
    own = inside & (j != absent)[:, None]
    y = tl.load(y_ptr + t[:, None] * y_stride + d[None, :], mask=inside, other=0)
    wide = y.to(ACC)
    vector = j[:, None] * width + d[None, :]
    if SCALE:
        wide *= tl.load(g_ptr + vector, mask=own, other=0)
    if SHIFT:
        wide += tl.load(b_ptr + vector, mask=own, other=0)
    tl.store(out_ptr + t[:, None] * width + d[None, :], tl.where(own, wide.to(y.dtype), y), mask=inside)


@triton.jit
def sums_kernel(
    grad_ptr,
    y_ptr,
    dg_ptr,
    db_ptr,
    groups_ptr,
    spans_ptr,
    width,
    grad_stride,
    y_stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    ACC: tl.constexpr,
):
    """dg[j] = sum_t grad[t] y[t] and db[j] = sum_t grad[t] over the rows of graft j, span after span."""
    group = groups_ptr + tl.program_id(0).to(tl.int64) * 3
    j, low, high = tl.load(group), tl.load(group + 1), tl.load(group + 2)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    dg = tl.full((HEIGHT, WIDTH), 0, ACC)
    db = tl.full((HEIGHT, WIDTH), 0, ACC)
    for span in range(low, high):
        stop = tl.load(spans_ptr + 2 * span + 1)
        for first in range(tl.load(spans_ptr + 2 * span), stop, HEIGHT):
            t = first + tl.arange(0, HEIGHT)
            inside = (t < stop)[:, None] & (d < width)[None, :]
            grad = tl.load(grad_ptr + t[:, None] * grad_stride + d[None, :], mask=inside, other=0).to(ACC)
            if SCALE:
                y = tl.load(y_ptr + t[:, None] * y_stride + d[None, :], mask=inside, other=0)
                dg += grad * y.to(ACC)
            if SHIFT:
                db += grad
    out = j * width + d
    if SCALE:
        tl.store(dg_ptr + out, tl.sum(dg, 0), mask=d < width)
    if SHIFT:
        tl.store(db_ptr + out, tl.sum(db, 0), mask=d < width)
