"""The branch op on a GPU: plans, launches and the autograd of its Triton kernels.

shrink: H[s] = x[s] A[s]^T + a[s]^T; expand: y[s] += scale_s act(H[s]) B[s]; outer: dB[s] += (scale_s act(H[s]))^T
dy[s]. The backward is the same three: dH = act'(H) scale dy B^T is a shrink, dx += dH A an expand, dA += dH^T x an
outer; da is the sums of dH's columns. H lies flat, one [rows, rank] block a segment.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.branch.programs import columns_kernel, expand_kernel, outer_kernel, shrink_kernel
from polygraft.kernels.common.gpu import accumulator, adjacent
from polygraft.kernels.common.segments import Segments
from polygraft.kernels.common.tiles import BranchTiles

FEATURE_BYTES = 128  # of a row of x or y that a tile spans: 64 bf16 columns


def branch(  # noqa: PLR0913
    x_TI: Tensor,
    y_TO: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    segments: Segments,
    act: str = "identity",
    a_R1: Tensor | None = None,
) -> Tensor:
    """As `op.branch`, on tensors of one GPU (or of the CPU under TRITON_INTERPRET=1)."""
    assert x_TI.dtype == y_TO.dtype == A_RI.dtype == B_RO.dtype, (x_TI.dtype, y_TO.dtype, A_RI.dtype, B_RO.dtype)
    assert x_TI.shape[1] == A_RI.shape[1] and y_TO.shape[1] == B_RO.shape[1], (x_TI.shape, y_TO.shape)
    assert len(x_TI) == len(y_TO) and len(A_RI) == len(B_RO), (A_RI.shape, B_RO.shape)
    with torch.cuda.device_of(x_TI):  # type: ignore[no-untyped-call]  # autograd itself guards the backward
        return _Branch.apply(x_TI, y_TO, A_RI, B_RO, a_R1, segments, act)  # type: ignore[no-any-return,no-untyped-call]


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: FunctionCtx, x: Tensor, y: Tensor, A: Tensor, B: Tensor, a: Tensor | None, segments: Segments, act: str
    ) -> Tensor:
        plan = BranchTiles.of(segments, x.device)
        hidden = shrink(x, A, plan, bias=a)
        out = y.clone(memory_format=torch.contiguous_format)
        expand(hidden, B, out, plan, act=act, scaled=True)
        ctx.save_for_backward(x if A.requires_grad else None, A, B, hidden)  # type: ignore[arg-type]  # None is allowed
        ctx.plan, ctx.act, ctx.once = plan, act, segments.covers(len(A))  # type: ignore[attr-defined]
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, hidden = ctx.saved_tensors  # type: ignore[attr-defined]
        plan, act, once = ctx.plan, ctx.act, ctx.once  # type: ignore[attr-defined]
        needs = ctx.needs_input_grad  # type: ignore[attr-defined]
        dx = dA = dB = da = None
        if needs[3]:
            dB = outer(hidden, grad, B, plan, act=act, scaled=True, once=once)
        if needs[0] or needs[2] or needs[4]:
            dhidden = shrink(grad, B, plan, act=act, hidden=hidden)
            if needs[2]:
                dA = outer(dhidden, x, A, plan, act="identity", scaled=False, once=once)
            if needs[4]:
                da = _columns(dhidden, A, plan, once=once)
            if needs[0]:
                dx = grad.new_zeros(len(grad), A.shape[1])
                expand(dhidden, A, dx, plan, act="identity", scaled=False)
        return dx, grad if needs[1] else None, dA, dB, da, None, None


def shrink(
    x: Tensor,
    weight: Tensor,
    plan: BranchTiles,
    *,
    bias: Tensor | None = None,
    act: str = "identity",
    hidden: Tensor | None = None,
) -> Tensor:
    """Blocks x[s] weight[s]^T, flat, plus bias[s]^T, if given; given `hidden`, times scale_s act'(hidden[s])."""
    x, weight = adjacent(x), adjacent(weight)
    out = torch.empty(plan.hidden, dtype=x.dtype, device=x.device)
    for grid in plan.shrink:
        shrink_kernel[(len(grid.tiles),)](
            x,
            weight,
            out if bias is None else bias.contiguous(),
            out if hidden is None else hidden,
            out,
            plan.table,
            plan.scales,
            grid.tiles,
            x.stride(0),
            weight.stride(0),
            x.shape[1],
            HEIGHT=grid.height,
            WIDTH=grid.width,
            DEPTH=_features(x),
            ACT=act,
            BIASED=bias is not None,
            BACKWARD=hidden is not None,
            ACC=accumulator(x.dtype),
        )
    return out


def expand(hidden: Tensor, weight: Tensor, out: Tensor, plan: BranchTiles, *, act: str, scaled: bool) -> None:
    """out[s] += f(hidden[s]) weight[s], f being scale_s act(.) if `scaled`, else nothing."""
    weight = adjacent(weight)
    for grid in plan.expand:
        expand_kernel[(len(grid.tiles), triton.cdiv(out.shape[1], _features(out)))](
            hidden,
            weight,
            out,
            plan.table,
            plan.scales,
            grid.tiles,
            weight.stride(0),
            out.stride(0),
            out.shape[1],
            HEIGHT=grid.height,
            WIDTH=_step(grid.width, out),
            FEATURES=_features(out),
            ACT=act,
            SCALED=scaled,
            ACC=accumulator(out.dtype),
        )


def outer(hidden: Tensor, x: Tensor, like: Tensor, plan: BranchTiles, *, act: str, scaled: bool, once: bool) -> Tensor:  # noqa: PLR0913
    """Sums of f(hidden[s])^T x[s] over segments, as `like`; `once` says that every stack row has just one segment."""
    x = adjacent(x)
    out = (torch.empty_like if once else torch.zeros_like)(like, memory_format=torch.contiguous_format)
    for grid in plan.outer:
        outer_kernel[(len(grid.tiles), triton.cdiv(x.shape[1], _features(x)))](
            hidden,
            x,
            out,
            plan.table,
            plan.scales,
            grid.tiles,
            x.stride(0),
            out.stride(0),
            x.shape[1],
            HEIGHT=_step(grid.height, x),
            WIDTH=grid.width,
            FEATURES=_features(x),
            ACT=act,
            SCALED=scaled,
            ADD=not once,
            ACC=accumulator(x.dtype),
        )
    return out


def _columns(hidden: Tensor, stack: Tensor, plan: BranchTiles, *, once: bool) -> Tensor:
    """Sums of hidden[s] over its rows, [R, 1] for the rows of `stack`; `once` as in `outer`."""
    out = (stack.new_empty if once else stack.new_zeros)(len(stack), 1)
    for grid in plan.outer:
        columns_kernel[(len(grid.tiles),)](
            hidden,
            out,
            plan.table,
            grid.tiles,
            HEIGHT=grid.height,
            WIDTH=grid.width,
            ADD=not once,
            ACC=accumulator(hidden.dtype),
        )
    return out


def _features(x: Tensor) -> int:
    return FEATURE_BYTES // x.element_size()


def _step(extent: int, x: Tensor) -> int:
    """How much of a summed extent one product takes: all in tensor cores; else 16, more does not fit registers."""
    return extent if x.element_size() == 2 else 16
