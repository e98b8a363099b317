"""The sparse op on a GPU: entries summed place after place in an order that is sorted once a stack, so that no sum
needs an atomic addition; rows as the branch whose hidden values are scattered."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.branch.gpu import expand, outer, shrink
from polygraft.kernels.common import tiles
from polygraft.kernels.common.gpu import accumulator, adjacent
from polygraft.kernels.common.launches import EntryLaunches
from polygraft.kernels.common.segments import Segments
from polygraft.kernels.sparse.order import Order, SparseIndex
from polygraft.kernels.sparse.programs import columns_kernel, meet_kernel, values_kernel

FEATURES = 64  # outputs of a tile
ENTRIES, ROWS = 128, 16  # of a tile of values' gradients


def sparse(x_TI: Tensor, y_TO: Tensor, v_NK: Tensor, index: SparseIndex, segments: Segments) -> Tensor:
    """As `op.sparse`, on tensors of one GPU (or of the CPU under TRITON_INTERPRET=1)."""
    assert x_TI.dtype == y_TO.dtype and len(v_NK) == len(index), (x_TI.dtype, y_TO.dtype, v_NK.shape, len(index))
    op = _Entries if index.places.shape[1] == 2 else _Rows
    with torch.cuda.device_of(x_TI):  # type: ignore[no-untyped-call]  # autograd itself guards the backward
        return op.apply(x_TI, y_TO, v_NK, index, segments)  # type: ignore[no-any-return,no-untyped-call]


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, y: Tensor, v: Tensor, index: SparseIndex, segments: Segments) -> Tensor:
        ctx.save_for_backward(x, v)
        ctx.segments, ctx.index = segments, index  # type: ignore[attr-defined]
        out = y.clone(memory_format=torch.contiguous_format)
        _meet(adjacent(x), v, out, index.order(0), EntryLaunches.of(segments, x.device))
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, v = ctx.saved_tensors  # type: ignore[attr-defined]
        segments: Segments = ctx.segments  # type: ignore[attr-defined]
        index: SparseIndex = ctx.index  # type: ignore[attr-defined]
        needs = ctx.needs_input_grad  # type: ignore[attr-defined]
        plan, rows = EntryLaunches.of(segments, x.device), adjacent(grad)
        dx = dv = None
        if needs[0]:
            dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
            _meet(rows, v, dx, index.order(1), plan)
        if needs[2]:
            dv = _values(adjacent(x), rows, v, index.places, plan, once=segments.covers(len(v)))
        return dx, grad if needs[1] else None, dv, None, None


class _Rows(torch.autograd.Function):
    """Rows of S are the first matrix of a branch; the second, with a one in every row, is the index itself."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, y: Tensor, v: Tensor, index: SparseIndex, segments: Segments) -> Tensor:
        ctx.save_for_backward(x, v)
        ctx.segments, ctx.index = segments, index  # type: ignore[attr-defined]
        out = y.clone(memory_format=torch.contiguous_format)
        hidden = shrink(x, v.to(x.dtype), tiles.BranchTiles.of(segments, x.device))
        _meet(hidden, None, out, index.order(0), EntryLaunches.of(segments, x.device))
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, v = ctx.saved_tensors  # type: ignore[attr-defined]
        segments: Segments = ctx.segments  # type: ignore[attr-defined]
        index: SparseIndex = ctx.index  # type: ignore[attr-defined]
        needs = ctx.needs_input_grad  # type: ignore[attr-defined]
        plan = tiles.BranchTiles.of(segments, x.device)
        dx = dv = None
        if needs[0] or needs[2]:
            met = _columns(adjacent(grad), index.places, plan)
            if needs[0]:
                dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
                expand(met, v.to(x.dtype), dx, plan, act="identity", scaled=True)
            if needs[2]:
                dv = outer(met, x, v, plan, act="identity", scaled=True, once=segments.covers(len(v)))
        return dx, grad if needs[1] else None, dv, None, None


def _meet(source: Tensor, v: Tensor | None, out: Tensor, order: Order, plan: EntryLaunches) -> None:
    """out[s, place(k)] += scale_s v[k] source[s, other(k)]; without v `source` is blocks [rows, size], and what is
    added source[s][:, k]."""
    bounds = order.bounds(plan.edges, out.shape[1])
    kept = out if v is None else v
    for grid in plan.batch:
        meet_kernel[len(grid.tiles), triton.cdiv(out.shape[1], FEATURES)](
            source,
            kept.contiguous(),
            out,
            order.entry_N,
            order.other_N,
            bounds,
            plan.ranges,
            plan.table,
            plan.scales,
            grid.tiles,
            source.stride(0),
            out.stride(0),
            out.shape[1],
            HEIGHT=grid.height,
            FEATURES=FEATURES,
            ENTRIES=v is not None,
            ACC=accumulator(kept.dtype),
        )


def _values(x: Tensor, grad: Tensor, v: Tensor, i: Tensor, plan: EntryLaunches, *, once: bool) -> Tensor:
    """The gradient of entries' values; `once` says that every one has just one segment."""
    out = (torch.empty_like if once else torch.zeros_like)(v, memory_format=torch.contiguous_format)
    for own, most in plan.stack:
        values_kernel[len(own), triton.cdiv(most, ENTRIES)](
            x,
            grad,
            i.contiguous(),
            out,
            own,
            plan.table,
            plan.scales,
            x.stride(0),
            grad.stride(0),
            HEIGHT=ROWS,
            WIDTH=ENTRIES,
            ADD=not once,
            ACC=accumulator(v.dtype),
        )
    return out


def _columns(source: Tensor, i: Tensor, plan: tiles.BranchTiles) -> Tensor:
    """Blocks source[s, i[k]] for the stack rows k of every segment, flat as `shrink` has them."""
    out = torch.empty(plan.hidden, dtype=source.dtype, device=source.device)
    for grid in plan.shrink:
        columns_kernel[(len(grid.tiles),)](
            source,
            i.contiguous(),
            out,
            plan.table,
            grid.tiles,
            source.stride(0),
            HEIGHT=grid.height,
            WIDTH=grid.width,
        )
    return out
