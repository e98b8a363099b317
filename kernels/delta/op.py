"""The delta op: y[s] += x[s] G(t_s)^T over segments s, with a dense dW = G(t) that is made from few numbers and exists
only while it is multiplied with (LoHa, LoKr, FourierFT, ...)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.common.matmul import add_segment_bmm_, segment_bmm
from polygraft.kernels.common.segments import Segment, Segments

Generate = Callable[[Tensor], Tensor]


def delta(x_TI: Tensor, y_TO: Tensor, t_N1: Tensor, segments: Segments, generate: Mapping[int, Generate]) -> Tensor:
    """Semantics: out = y; out[s.start:s.stop] += s.scale * x[s.start:s.stop] @ W_s^T with W_s =
    generate[s.first](t[s.first:s.last]).

    x [T, in] and y [T, out] of one dtype; t [N, 1] in float32 or wider, the generators' numbers of all grafts; W_s
    [out, in] is rounded to x's dtype. Segments may overlap. Differentiable in x, y and t; dW is made again in the
    backward. One product a segment: its sums are the segment's alone.
    """
    if not segments.items:
        return y_TO
    return _Delta.apply(x_TI, y_TO, t_N1, segments, generate)  # type: ignore[no-any-return,no-untyped-call]


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, y: Tensor, t: Tensor, segments: Segments, generate: Mapping[int, Generate]
    ) -> Tensor:
        ctx.save_for_backward(x, t)
        ctx.work = segments, generate  # type: ignore[attr-defined]
        out = y.clone()
        for s in _filled(segments):
            W = generate[s.first](_own(t, s)).to(x.dtype)
            add_segment_bmm_(out[None, s.start : s.stop], x[None, s.start : s.stop], s.scale * W.T[None])
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, t = ctx.saved_tensors  # type: ignore[attr-defined]
        segments, generate = ctx.work  # type: ignore[attr-defined]
        dx, dt = torch.zeros_like(x), torch.zeros_like(t)
        for s in _filled(segments):
            own = _own(t, s).requires_grad_()
            with torch.enable_grad():
                W = generate[s.first](own)
            rows, dy = x[s.start : s.stop], grad[s.start : s.stop]
            add_segment_bmm_(dx[None, s.start : s.stop], dy[None], s.scale * W.detach().to(x.dtype)[None])
            dW = segment_bmm(dy.T[None], rows[None])[0].to(W.dtype) * s.scale
            dt[s.first : s.last] += torch.autograd.grad(W, own, dW)[0]
        return dx, grad, dt, None, None


def _filled(segments: Segments) -> list[Segment]:
    """Those with rows: oneDNN has no product of none."""
    return [s for s in segments if s.rows]


def _own(t: Tensor, s: Segment) -> Tensor:
    """A segment's numbers, copied: where they lie among others' must not decide how a product of them is rounded."""
    return t[s.first : s.last].detach().clone()
