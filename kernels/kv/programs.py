"""The kv op's Triton programs: softmax a tile of keys at a time (Dao et al. 2022, algorithm 1), prefix rows first.

A program works for one sequence alone; nothing is summed across programs. Keys that a query may not see are selected
out.
"""

# Triton reads no annotation but constexpr, and its decorator is untyped.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    pk_ptr,
    pv_ptr,
    out_ptr,
    lse_ptr,
    table_ptr,
    tiles_ptr,
    rows,
    width,
    kv_width,
    group,
    head_dim,
    window,
    SCALING: tl.constexpr,
    CAP: tl.constexpr,
    HEIGHT: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD: tl.constexpr,
    ACC: tl.constexpr,
):
    """out = softmax(SCALING q [pk; k]^T, causal) [pv; v] for a tile of queries of one head; lse its log of sums."""
    sequence, tile = _tile(tiles_ptr)
    start, length, prefix_first, prefix_length, _partial = _sequence(table_ptr, sequence)
    head = tl.program_id(1).to(tl.int64)
    t = tile * HEIGHT + tl.arange(0, HEIGHT)
    d = tl.arange(0, HEAD)
    column = (head // group) * head_dim + d
    query = (start + t)[:, None] * width + (head * head_dim + d)[None, :]
    inside = (t < length)[:, None] & (d < head_dim)[None, :]
    q = tl.load(q_ptr + query, mask=inside, other=0)
    top = tl.full((HEIGHT,), float("-inf"), ACC)
    total = tl.full((HEIGHT,), 0, ACC)
    acc = tl.full((HEIGHT, HEAD), 0, ACC)
    for low in range(_first(prefix_length + tile * HEIGHT, window, KEYS), prefix_length, KEYS):
        c = low + tl.arange(0, KEYS)
        seen = (c[None, :] > prefix_length + t[:, None] - window) & (c < prefix_length)[None, :]
        address = (prefix_first + c)[:, None] * kv_width + column[None, :]
        present = (c < prefix_length)[:, None] & (d < head_dim)[None, :]
        acc, top, total = _step(
            q, pk_ptr + address, pv_ptr + address, present, seen, acc, top, total, SCALING, CAP, ACC
        )
    for low in range(_first(tile * HEIGHT, window, KEYS), tl.minimum(length, (tile + 1) * HEIGHT), KEYS):
        c = low + tl.arange(0, KEYS)
        seen = (c[None, :] <= t[:, None]) & (c[None, :] > t[:, None] - window) & (c < length)[None, :]
        address = (start + c)[:, None] * kv_width + column[None, :]
        present = (c < length)[:, None] & (d < head_dim)[None, :]
        acc, top, total = _step(q, k_ptr + address, v_ptr + address, present, seen, acc, top, total, SCALING, CAP, ACC)
    tl.store(out_ptr + query, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + head * rows + start + t, top + tl.log(total), mask=t < length)


@triton.jit
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    pk_ptr,
    pv_ptr,
    grad_ptr,
    lse_ptr,
    inner_ptr,
    dq_ptr,
    table_ptr,
    tiles_ptr,
    rows,
    width,
    kv_width,
    group,
    head_dim,
    window,
    SCALING: tl.constexpr,
    CAP: tl.constexpr,
    HEIGHT: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD: tl.constexpr,
    ACC: tl.constexpr,
):
    """dq of a tile of queries: SCALING (p (dout v^T - inner)) k over the keys it sees, inner = sum_d out dout."""
    sequence, tile = _tile(tiles_ptr)
    start, length, prefix_first, prefix_length, _partial = _sequence(table_ptr, sequence)
    head = tl.program_id(1).to(tl.int64)
    t = tile * HEIGHT + tl.arange(0, HEIGHT)
    d = tl.arange(0, HEAD)
    column = (head // group) * head_dim + d
    query = (start + t)[:, None] * width + (head * head_dim + d)[None, :]
    inside = (t < length)[:, None] & (d < head_dim)[None, :]
    q = tl.load(q_ptr + query, mask=inside, other=0)
    grad = tl.load(grad_ptr + query, mask=inside, other=0)
    lse = tl.load(lse_ptr + head * rows + start + t, mask=t < length, other=0)
    inner = tl.load(inner_ptr + head * rows + start + t, mask=t < length, other=0)
    acc = tl.full((HEIGHT, HEAD), 0, ACC)
    for low in range(_first(prefix_length + tile * HEIGHT, window, KEYS), prefix_length, KEYS):
        c = low + tl.arange(0, KEYS)
        seen = (c[None, :] > prefix_length + t[:, None] - window) & (t < length)[:, None] & (c < prefix_length)[None, :]
        address = (prefix_first + c)[:, None] * kv_width + column[None, :]
        present = (c < prefix_length)[:, None] & (d < head_dim)[None, :]
        k = tl.load(pk_ptr + address, mask=present, other=0)
        v = tl.load(pv_ptr + address, mask=present, other=0)
        _p, ds = _weights(q, k, v, grad, lse, inner, seen, SCALING, CAP, ACC)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee", out_dtype=ACC)
    for low in range(_first(tile * HEIGHT, window, KEYS), tl.minimum(length, (tile + 1) * HEIGHT), KEYS):
        c = low + tl.arange(0, KEYS)
        seen = (t < length)[:, None] & (c[None, :] <= t[:, None]) & (c < length)[None, :]
        seen = seen & (c[None, :] > t[:, None] - window)
        address = (start + c)[:, None] * kv_width + column[None, :]
        present = (c < length)[:, None] & (d < head_dim)[None, :]
        k = tl.load(k_ptr + address, mask=present, other=0)
        v = tl.load(v_ptr + address, mask=present, other=0)
        _p, ds = _weights(q, k, v, grad, lse, inner, seen, SCALING, CAP, ACC)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee", out_dtype=ACC)
    tl.store(dq_ptr + query, acc.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    inner_ptr,
    dk_ptr,
    dv_ptr,
    table_ptr,
    tiles_ptr,
    rows,
    width,
    kv_width,
    group,
    head_dim,
    window,
    SCALING: tl.constexpr,
    CAP: tl.constexpr,
    PREFIX: tl.constexpr,
    HEIGHT: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD: tl.constexpr,
    ACC: tl.constexpr,
):
    """dk and dv of a tile of a sequence's own keys, or of its prefix's (PREFIX, into rows of its own), over the group's
    heads and the queries that see it."""
    sequence, tile = _tile(tiles_ptr)
    start, length, prefix_first, prefix_length, partial = _sequence(table_ptr, sequence)
    kv_head = tl.program_id(1).to(tl.int64)
    c = tile * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, HEAD)
    column = (kv_head * head_dim + d)[None, :]
    count, first, into, begin = length, start, start, (tile * KEYS // HEIGHT) * HEIGHT
    stop = tl.minimum(length, (tile + 1) * KEYS - 1 + window)  # the window of the tile's last key ends before it
    if PREFIX:
        count, first, into, begin = prefix_length, prefix_first, partial, tile * 0
        stop = tl.minimum(length, (tile + 1) * KEYS - 1 + window - prefix_length)
    present = (c < count)[:, None] & (d < head_dim)[None, :]
    k = tl.load(k_ptr + (first + c)[:, None] * kv_width + column, mask=present, other=0)
    v = tl.load(v_ptr + (first + c)[:, None] * kv_width + column, mask=present, other=0)
    dk = tl.full((KEYS, HEAD), 0, ACC)
    dv = tl.full((KEYS, HEAD), 0, ACC)
    for member in range(0, group):
        head = kv_head * group + member
        for low in range(begin, stop, HEIGHT):
            t = low + tl.arange(0, HEIGHT)
            query = (start + t)[:, None] * width + (head * head_dim + d)[None, :]
            inside = (t < length)[:, None] & (d < head_dim)[None, :]
            q = tl.load(q_ptr + query, mask=inside, other=0)
            grad = tl.load(grad_ptr + query, mask=inside, other=0)
            lse = tl.load(lse_ptr + head * rows + start + t, mask=t < length, other=0)
            inner = tl.load(inner_ptr + head * rows + start + t, mask=t < length, other=0)
            seen = (t < length)[:, None] & (c < count)[None, :]
            if PREFIX:
                seen = seen & (c[None, :] > prefix_length + t[:, None] - window)
            else:
                seen = seen & (c[None, :] <= t[:, None]) & (c[None, :] > t[:, None] - window)
            p, ds = _weights(q, k, v, grad, lse, inner, seen, SCALING, CAP, ACC)
            dv = tl.dot(tl.trans(p).to(grad.dtype), grad, dv, input_precision="ieee", out_dtype=ACC)
            dk = tl.dot(tl.trans(ds).to(q.dtype), q, dk, input_precision="ieee", out_dtype=ACC)
    out = (into + c)[:, None] * kv_width + column
    tl.store(dk_ptr + out, dk.to(dk_ptr.dtype.element_ty), mask=present)
    tl.store(dv_ptr + out, dv.to(dv_ptr.dtype.element_ty), mask=present)


@triton.jit
def paged_kernel(
    q_ptr,
    cache_ptr,
    out_ptr,
    sums_ptr,
    blocks_ptr,
    table_ptr,
    tiles_ptr,
    width,
    kv_width,
    group,
    head_dim,
    window,
    SCALING: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD: tl.constexpr,
    ACC: tl.constexpr,
):
    """The same for rows that continue a cached sequence; a tile holds all heads of the group of one key head, so that
    keys are read once for them."""
    sequence, tile = _tile(tiles_ptr)
    start, rows, before, unseen, first = _sequence(table_ptr, sequence)
    kv_head = tl.program_id(1).to(tl.int64)
    m = tile * HEIGHT + tl.arange(0, HEIGHT)
    t, head = m // group, kv_head * group + m % group
    d = tl.arange(0, HEAD)
    query = (start + t)[:, None] * width + head[:, None] * head_dim + d[None, :]
    inside = (t < rows)[:, None] & (d < head_dim)[None, :]
    q = tl.load(q_ptr + query, mask=inside, other=0)
    top = tl.full((HEIGHT,), float("-inf"), ACC)
    total = tl.full((HEIGHT,), 0, ACC)
    acc = tl.full((HEIGHT, HEAD), 0, ACC)
    stop = before + tl.minimum(rows, (tile * HEIGHT + HEIGHT - 1) // group + 1)
    begin = tl.maximum((unseen // KEYS) * KEYS, _first(before + tile * HEIGHT // group, window, KEYS))
    for low in range(begin, stop, KEYS):
        c = low + tl.arange(0, KEYS)
        seen = (c >= unseen)[None, :] & (c[None, :] <= before + t[:, None]) & (c < stop)[None, :]
        seen = seen & (c[None, :] > before + t[:, None] - window)
        block = tl.load(blocks_ptr + first + c // BLOCK, mask=c < stop, other=0)
        row = (block * BLOCK + c % BLOCK)[:, None] * 2 * kv_width + (kv_head * head_dim + d)[None, :]
        present = ((c >= unseen) & (c < stop))[:, None] & (d < head_dim)[None, :]
        acc, top, total = _step(
            q, cache_ptr + row, cache_ptr + row + kv_width, present, seen, acc, top, total, SCALING, CAP, ACC
        )
    tl.store(out_ptr + query, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    sums = sums_ptr + (start + t) * (width // head_dim) + head
    tl.store(sums, top + tl.log(total), mask=t < rows)


@triton.jit
def _step(q, k_at, v_at, present, seen, acc, top, total, SCALING: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr):
    """A tile of keys more: (acc, top, total), the sums being relative to exp(top)."""
    k = tl.load(k_at, mask=present, other=0)
    v = tl.load(v_at, mask=present, other=0)
    scores = _bent(tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * SCALING, CAP)
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(higher > float("-inf"), higher, 0)  # a window may begin in a later tile of keys
    shrunk = tl.exp(top - base)
    p = tl.exp(scores - base[:, None])
    acc = tl.dot(p.to(v.dtype), v, acc * shrunk[:, None], input_precision="ieee", out_dtype=ACC)
    return acc, higher, total * shrunk + tl.sum(p, 1)


@triton.jit
def _weights(q, k, v, grad, lse, inner, seen, SCALING: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr):
    """(p, ds): the softmax again from its log sums, and the gradient of the unscaled scores."""
    scores = _bent(tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * SCALING, CAP)
    p = tl.where(seen, tl.exp(scores - lse[:, None]), 0)
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee", out_dtype=ACC)
    ds = p * (dp - inner[:, None]) * SCALING
    if CAP > 0:
        ds = ds * (1 - (scores / CAP) * (scores / CAP))
    return p, ds


@triton.jit
def _bent(scores, CAP: tl.constexpr):
    """CAP tanh(scores / CAP), or the scores for a CAP of 0."""
    if CAP > 0:
        scores = CAP * (1 - 2 / (tl.exp(2 * scores / CAP) + 1))
    return scores


@triton.jit
def _first(position, window, KEYS: tl.constexpr):
    """Where the tile of keys begins that holds the first one that the query at `position` sees."""
    return tl.maximum(position - window + 1, 0) // KEYS * KEYS


@triton.jit
def _tile(tiles_ptr):
    """(sequence, tile) of this program, int64, so that every address built from them is."""
    tile = tiles_ptr + tl.program_id(0).to(tl.int64) * 2
    return tl.load(tile).to(tl.int64), tl.load(tile + 1).to(tl.int64)


@triton.jit
def _sequence(table_ptr, sequence):
    """A row of the plan's table, int64."""
    row = table_ptr + sequence * 5
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
