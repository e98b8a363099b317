"""The kv op on a GPU: whole sequences with gradients, and rows that continue sequences cached in blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.kv.layout import Layout
from polygraft.kernels.kv.paged import PagedLayer
from polygraft.kernels.kv.programs import attend_kernel, key_gradient_kernel, paged_kernel, query_gradient_kernel
from polygraft.kernels.kv.scores import Scores
from polygraft.kernels.kv.tiles import KEYS, AttentionTiles, Grid, PagedTiles

_ROWS = 16  # queries of a tile where the keys' gradient loops over them
_ALL = (1 << 31) - 1  # a window that hides nothing


def attend(  # noqa: PLR0913
    q_TE: Tensor, k_TC: Tensor, v_TC: Tensor, pk_PC: Tensor, pv_PC: Tensor, layout: Layout, scores: Scores
) -> Tensor:
    """As `op.attend`, on tensors of one GPU (or of the CPU under TRITON_INTERPRET=1)."""
    return attend_with_sums(q_TE, k_TC, v_TC, pk_PC, pv_PC, layout, scores)[0]


def attend_with_sums(  # noqa: PLR0913
    q_TE: Tensor, k_TC: Tensor, v_TC: Tensor, pk_PC: Tensor, pv_PC: Tensor, layout: Layout, scores: Scores
) -> tuple[Tensor, Tensor]:
    """As `op.attend_with_sums`."""
    with torch.cuda.device_of(q_TE):  # type: ignore[no-untyped-call]  # autograd itself guards the backward
        out, lse = _Attend.apply(q_TE, k_TC, v_TC, pk_PC, pv_PC, layout, scores)  # type: ignore[no-untyped-call]
    return out, lse.T


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, layout: Layout, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        q, k, v, pk, pv = (x.contiguous() for x in (q, k, v, pk, pv))
        plan, out = AttentionTiles.of(layout, q.device), torch.zeros_like(q)
        lse = torch.full((layout.heads, len(q)), float("-inf"), dtype=_wide(q), device=q.device)
        for grid in plan.queries:
            attend_kernel[len(grid.tiles), layout.heads](
                q, k, v, pk, pv, out, lse, plan.table, grid.tiles, *_shape(q, k, layout, scores),
                **_constants(q, layout.heads, scores), HEIGHT=grid.height,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, pk, pv, out, lse)
        ctx.layout, ctx.scores, ctx.plan = layout, scores, plan  # type: ignore[attr-defined]
        return out, lse

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pk, pv, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
        layout, scores, plan = ctx.layout, ctx.scores, ctx.plan  # type: ignore[attr-defined]
        constants = _constants(q, layout.heads, scores)
        grad, wide = grad.contiguous(), _wide(q)
        inner = torch.unflatten(grad.to(wide) * out, 1, (layout.heads, -1)).sum(-1).T - grad_lse
        inner = inner.contiguous()
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        shape = _shape(q, k, layout, scores)
        for grid in plan.queries:
            query_gradient_kernel[len(grid.tiles), layout.heads](
                q, k, v, pk, pv, grad, lse, inner, dq, plan.table, grid.tiles, *shape,
                **constants, HEIGHT=grid.height,
            )  # fmt: skip
        shares = [torch.empty(plan.prefix_rows, k.shape[1], dtype=wide, device=q.device) for _ in range(2)]
        launches: tuple[tuple[tuple[Grid, ...], bool, tuple[Tensor, ...]], ...] = (
            (plan.keys, False, (k, v, dk, dv)),
            (plan.prefixes, True, (pk, pv, *shares)),
        )
        for tiles, prefix, (keys, values, dkeys, dvalues) in launches:
            for grid in tiles:
                key_gradient_kernel[len(grid.tiles), layout.kv_heads](
                    q, keys, values, grad, lse, inner, dkeys, dvalues, plan.table, grid.tiles, *shape,
                    **constants, PREFIX=prefix, HEIGHT=_ROWS,
                )  # fmt: skip
        return dq, dk, dv, _gathered(pk, shares[0], layout), _gathered(pv, shares[1], layout), None, None


def _gathered(prefix: Tensor, shares: Tensor, layout: Layout) -> Tensor:
    """The gradient of the prefix stack: every sequence's share, in the sequences' order."""
    total = torch.zeros_like(prefix, dtype=shares.dtype)
    offset = 0
    for s in layout.sequences:
        if s.prefix_length:
            total[s.prefix_first : s.prefix_first + s.prefix_length] += shares[offset : offset + s.prefix_length]
            offset += s.prefix_length
    return total.to(prefix.dtype)


def attend_paged(
    q_TE: Tensor, cache: Tensor, tiles: PagedTiles, layer: PagedLayer, sums_TH: Tensor | None = None
) -> Tensor:
    """out[row] = softmax(scaling * q[row] K^T) V over the window that ends at the row's position, with keys and values
    in cache [blocks, block_size, 2, kv_width]; other rows are 0. Not differentiable. The log sums of the scores are
    written into `sums_TH`, where it is given.
    """
    q, out = q_TE.contiguous(), torch.zeros_like(q_TE, memory_format=torch.contiguous_format)
    heads, kv_heads, scores = layer.heads, layer.kv_heads, layer.scores
    sums = torch.empty(len(q), heads, dtype=_wide(q), device=q.device) if sums_TH is None else sums_TH
    table, constants = tiles.table(layer.layer), _constants(q, heads, scores)
    shape = (q.shape[1], cache.shape[-1], heads // kv_heads, q.shape[1] // heads, scores.window or _ALL)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        for grid in tiles.queries:
            paged_kernel[len(grid.tiles), kv_heads](
                q, cache, out, sums, tiles.blocks, table, grid.tiles, *shape,
                **constants, BLOCK=cache.shape[1], HEIGHT=grid.height,
            )  # fmt: skip
    return out


def _shape(q: Tensor, k: Tensor, layout: Layout, scores: Scores) -> tuple[int, ...]:
    """Rows, widths, query heads of a key head, the size of a head, and the window, as the programs take them."""
    group, head_dim = layout.heads // layout.kv_heads, q.shape[1] // layout.heads
    return len(q), q.shape[1], k.shape[1], group, head_dim, scores.window or _ALL


def _constants(q: Tensor, heads: int, scores: Scores) -> dict[str, object]:
    head = max(16, triton.next_power_of_2(q.shape[1] // heads))
    acc = tl.float64 if q.dtype == torch.float64 else tl.float32
    return {"SCALING": scores.scaling, "CAP": scores.cap or 0.0, "KEYS": KEYS, "HEAD": head, "ACC": acc}


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
