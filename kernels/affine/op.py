"""The affine op: y[s] = y[s] * g_s + b_s over segments s, one vector pair a graft (IA3, BitFit, DoRA's magnitude)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.common.segments import Segments


def affine(y_TD: Tensor, g_JD: Tensor | None, b_JD: Tensor | None, segments: Segments) -> Tensor:
    """Semantics: out[s.start:s.stop] = y[s.start:s.stop] * g[s.first] + b[s.first]; other rows pass unchanged.

    y [T, D]; g and b [J, D] in float32 (float64 beside float64), or None; the product is taken in their precision and
    rounded once. Segments must not overlap (a weighted set over ops that do not add is refused before it gets here).
    Differentiable; dg and db sum over their own segment's rows only.
    """
    if not segments.items:
        return y_TD
    if y_TD.is_cuda:
        from polygraft.kernels.affine import gpu  # Triton is loaded only where there is a GPU

        return gpu.affine(y_TD, g_JD, b_JD, segments)
    vectors = [v for v in (g_JD, b_JD) if v is not None]
    if torch.is_grad_enabled() and (y_TD.requires_grad or any(v.requires_grad for v in vectors)):
        return _Affine.apply(y_TD, g_JD, b_JD, segments)  # type: ignore[no-any-return,no-untyped-call]
    return _forward(y_TD, g_JD, b_JD, segments)


def _forward(y: Tensor, g: Tensor | None, b: Tensor | None, segments: Segments) -> Tensor:
    if len(segments) > 4:
        return _gathered(y, g, b, segments)
    out = y.clone()
    for s in segments:
        rows = y[s.start : s.stop]
        rows = rows if g is None else rows * g[s.first]
        out[s.start : s.stop] = rows if b is None else rows + b[s.first]
    return out


def _gathered(y: Tensor, g: Tensor | None, b: Tensor | None, segments: Segments) -> Tensor:
    """The same with one gather of the vectors for all rows; rows without a segment meet g = 1, b = 0."""
    stack_rows = len(g) if g is not None else len(b)  # type: ignore[arg-type]
    index = segments.index_T(len(y), stack_rows, y.device)
    wide = y if g is None else y * torch.cat([g, g.new_ones(1, g.shape[1])])[index]
    wide = wide if b is None else wide + torch.cat([b, b.new_zeros(1, b.shape[1])])[index]
    return wide.to(y.dtype)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, g: Tensor | None, b: Tensor | None, segments: Segments) -> Tensor:
        ctx.save_for_backward(y if g is not None else None, g, b)  # type: ignore[arg-type]  # None is allowed
        ctx.segments = segments  # type: ignore[attr-defined]
        return _forward(y, g, b, segments)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, g, b = ctx.saved_tensors  # type: ignore[attr-defined]
        segments: Segments = ctx.segments  # type: ignore[attr-defined]
        dg = torch.zeros_like(g) if g is not None else None
        db = torch.zeros_like(b) if b is not None else None
        dy = grad if g is None else grad.clone()
        for s in segments:
            rows = grad[s.start : s.stop]
            if g is not None and dg is not None and y is not None:
                dg[s.first] += (rows.to(g.dtype) * y[s.start : s.stop]).sum(0)
                dy[s.start : s.stop] = rows * g[s.first]
            if b is not None and db is not None:
                db[s.first] += rows.to(b.dtype).sum(0)
        return dy, dg, db, None
