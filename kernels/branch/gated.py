"""The gated branch: y[s] += scale_s * (act(x[s] A_s^T) * w) B_s, where every row weighs the ranks itself, w =
gate(x[s] G_s^T) (mixtures of LoRA experts, Zadouri et al. 2023; UniPELT, Mao et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.branch import activation
from polygraft.kernels.common.matmul import add_segment_bmm_, segment_bmm
from polygraft.kernels.common.segments import Segment, Segments


@dataclass(frozen=True, slots=True)
class Gate:
    """Weights of a row's experts from its scores: each its own `sigmoid`, or a `softmax` over all of them, or over the
    `top` highest (0: all), the others being 0."""

    kind: str
    top: int = 0

    def weights(self, scores_TE: Tensor) -> Tensor:
        """[T, experts]; differentiable. A score that is among the highest at a tie is chosen by its place."""
        if self.kind == "sigmoid":
            return torch.sigmoid(scores_TE)
        if 0 < self.top < scores_TE.shape[1]:
            chosen = scores_TE.topk(self.top, dim=1).indices
            out = torch.ones_like(scores_TE, dtype=torch.bool).scatter_(1, chosen, False)
            scores_TE = scores_TE.masked_fill(out, -torch.inf)
        return torch.softmax(scores_TE, dim=1)

    def slope(self, grad_TE: Tensor, weights_TE: Tensor) -> Tensor:
        """The gradient of the scores from that of the weights."""
        if self.kind == "sigmoid":
            return grad_TE * weights_TE * (1 - weights_TE)
        return weights_TE * (grad_TE - (grad_TE * weights_TE).sum(1, keepdim=True))


def gated(
    x_TI: Tensor,
    y_TO: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    G_EI: Tensor,
    segments: Segments,
    gates: Segments,
    act: str,
    gate: Gate,
) -> Tensor:
    """Semantics: out = y; with s and g the i-th of `segments` and `gates`, x_s = x[s.start:s.stop], h = act(x_s @
    A[s.first:s.last]^T) and w = gate(x_s @ G[g.first:g.last]^T), out[s.start:s.stop] += s.scale * (h * w') @
    B[s.first:s.last], w' being w with every expert's weight over its rank / experts neighbouring ranks.

    x [T, in], y [T, out], A [R, in], B [R, out] and G [E, in] of one dtype. Segments may overlap. Differentiable in x,
    y, A, B and G. One segment after the other, so that a segment's numbers are its own.
    """
    if not segments.items:
        return y_TO
    return _Gated.apply(x_TI, y_TO, A_RI, B_RO, G_EI, segments, gates, act, gate)  # type: ignore[no-any-return,no-untyped-call]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        y: Tensor,
        A: Tensor,
        B: Tensor,
        G: Tensor,
        segments: Segments,
        gates: Segments,
        act: str,
        gate: Gate,
    ) -> Tensor:
        ctx.save_for_backward(x, A, B, G)
        ctx.work = segments, gates, act, gate  # type: ignore[attr-defined]
        out = y.clone()
        for s, g in _pairs(segments, gates):
            hidden, weights = _down(x, A, s), gate.weights(_down(x, G, g)[0])
            up = activation.forward(act, hidden) * _spread(weights, s) * s.scale
            add_segment_bmm_(out[None, s.start : s.stop], up, B[None, s.first : s.last])
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, G = ctx.saved_tensors  # type: ignore[attr-defined]
        segments, gates, act, gate = ctx.work  # type: ignore[attr-defined]
        grad = grad.contiguous()
        dx, dA, dB, dG = (torch.zeros_like(tensor) for tensor in (x, A, B, G))
        for s, g in _pairs(segments, gates):
            rows, dy = x[None, s.start : s.stop], grad[None, s.start : s.stop]
            hidden, weights = _down(x, A, s), gate.weights(_down(x, G, g)[0])
            spread, active = _spread(weights, s) * s.scale, activation.forward(act, hidden)
            dup = segment_bmm(dy, B[None, s.first : s.last].transpose(1, 2))
            dweights = (dup * active * s.scale).view(*weights.shape, -1).sum(-1)
            dhidden = activation.backward(act, dup * spread, hidden)
            dscores = gate.slope(dweights, weights)[None]
            dB[s.first : s.last] += segment_bmm((active * spread).transpose(1, 2), dy)[0]
            dA[s.first : s.last] += segment_bmm(dhidden.transpose(1, 2), rows)[0]
            dG[g.first : g.last] += segment_bmm(dscores.transpose(1, 2), rows)[0]
            add_segment_bmm_(dx[None, s.start : s.stop], dhidden, A[None, s.first : s.last])
            add_segment_bmm_(dx[None, s.start : s.stop], dscores, G[None, g.first : g.last])
        return dx, grad, dA, dB, dG, None, None, None, None


def _pairs(segments: Segments, gates: Segments) -> list[tuple[Segment, Segment]]:
    return [(s, g) for s, g in zip(segments, gates, strict=True) if s.rows and s.size]


def _down(x: Tensor, weight: Tensor, s: Segment) -> Tensor:
    """x[s] weight[s]^T, [1, rows, size]."""
    return segment_bmm(x[None, s.start : s.stop], weight[None, s.first : s.last].transpose(1, 2))


def _spread(weights_TE: Tensor, s: Segment) -> Tensor:
    """Every expert's weight over its ranks, [1, rows, ranks]."""
    return weights_TE.repeat_interleave(s.size // weights_TE.shape[1], dim=1)[None]
