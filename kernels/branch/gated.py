"""The gated branch: y[s] += scale_s * (act(x[s] A_s^T) * w) B_s, where every row weighs the ranks itself, w =
gate(x[s] G_s^T) (mixtures of LoRA experts, Zadouri et al. 2023; UniPELT, Mao et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.branch import activation
from polygraft.kernels.common.gate import Gate
from polygraft.kernels.common.matmul import add_segment_bmm_, segment_bmm
from polygraft.kernels.common.segments import Segment, Segments


def gated(  # noqa: PLR0913
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
    A[s.first:s.last]^T) and w = gate(x_s @ G[g.first:g.last]^T, h), out[s.start:s.stop] += s.scale * (h * w') @
    B[s.first:s.last], w' being w with every expert's weight over its rank / experts neighbouring ranks.

    x [T, in], y [T, out], A [R, in], B [R, out] and G [E, in] of one dtype. Segments may overlap. Differentiable in x,
    y, A, B and G. One segment after the other, so that a segment's numbers are its own.
    """
    if not segments.items:
        return y_TO
    return _Gated.apply(x_TI, y_TO, A_RI, B_RO, G_EI, segments, gates, act, gate)  # type: ignore[no-any-return,no-untyped-call]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913
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
        for s, g in pairs(segments, gates):
            active = activation.forward(act, down(x, A, s))
            weights = gate.weights(gate.scores(down(x, G, g)[0], active[0]))
            up = active * _spread(weights, s) * s.scale
            add_segment_bmm_(out[None, s.start : s.stop], up, B[None, s.first : s.last])
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, G = ctx.saved_tensors  # type: ignore[attr-defined]
        segments, gates, act, gate = ctx.work  # type: ignore[attr-defined]
        grad = grad.contiguous()
        dx, dA, dB, dG = (torch.zeros_like(tensor) for tensor in (x, A, B, G))
        for s, g in pairs(segments, gates):
            rows, dy = x[None, s.start : s.stop], grad[None, s.start : s.stop]
            hidden, read = down(x, A, s), down(x, G, g)
            active = activation.forward(act, hidden)
            weights = gate.weights(gate.scores(read[0], active[0]))
            spread = _spread(weights, s) * s.scale
            dup = segment_bmm(dy, B[None, s.first : s.last].transpose(1, 2))
            dweights = (dup * active * s.scale).view(*weights.shape, -1).sum(-1)
            dactive, dread = dup * spread, gate.slope(dweights, weights)[None]
            if gate.kind == "attention":
                dscores = _spread(dread[0], s)
                dactive, dread = dactive + dscores * read, dscores * active
            dhidden = activation.backward(act, dactive, hidden)
            dB[s.first : s.last] += segment_bmm((active * spread).transpose(1, 2), dy)[0]
            dA[s.first : s.last] += segment_bmm(dhidden.transpose(1, 2), rows)[0]
            dG[g.first : g.last] += segment_bmm(dread.transpose(1, 2), rows)[0]
            add_segment_bmm_(dx[None, s.start : s.stop], dhidden, A[None, s.first : s.last])
            add_segment_bmm_(dx[None, s.start : s.stop], dread, G[None, g.first : g.last])
        return dx, grad, dA, dB, dG, None, None, None, None


def pairs(segments: Segments, gates: Segments) -> list[tuple[Segment, Segment]]:
    """Segments that are not empty, each with that of its gate."""
    return [(s, g) for s, g in zip(segments, gates, strict=True) if s.rows and s.size]


def down(x: Tensor, weight: Tensor, s: Segment) -> Tensor:
    """x[s] weight[s]^T, [1, rows, size]."""
    return segment_bmm(x[None, s.start : s.stop], weight[None, s.first : s.last].transpose(1, 2))


def _spread(weights_TE: Tensor, s: Segment) -> Tensor:
    """Every expert's weight over its ranks, [1, rows, ranks]."""
    return weights_TE.repeat_interleave(s.size // weights_TE.shape[1], dim=1)[None]
