"""The noisy branch: y[s] += scale_s * (x[s] A_s^T + exp(x[s] G_s^T / 2) * z) B_s, whose hidden values are drawn from
N(x A^T, exp(x G^T)) in training and are their mean otherwise (PVeRA, as PEFT 0.21 has it)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.branch.gated import down, pairs
from polygraft.kernels.common.matmul import add_segment_bmm_, segment_bmm
from polygraft.kernels.common.noise import normal_rows
from polygraft.kernels.common.segments import Segment, Segments


def noisy(  # noqa: PLR0913
    x_TI: Tensor,
    y_TO: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    G_RI: Tensor,
    segments: Segments,
    gates: Segments,
    row_keys_T: Tensor | None,
    site_key: int,
) -> Tensor:
    """Semantics: out = y; with s and g the i-th of `segments` and `gates` and x_s = x[s.start:s.stop],
    out[s.start:s.stop] += s.scale * (x_s @ A[s.first:s.last]^T + exp(x_s @ G[g.first:g.last]^T / 2) * z) @
    B[s.first:s.last], z a normal number of (row key, site key, rank); z = 0 without row keys.

    x [T, in], y [T, out], A and G [R, in] and B [R, out] of one dtype. Segments may overlap. Differentiable in x, y, A,
    B and G. One segment after the other, so that a segment's numbers are its own.
    """
    if not segments.items:
        return y_TO
    return _Noisy.apply(x_TI, y_TO, A_RI, B_RO, G_RI, segments, gates, row_keys_T, site_key)  # type: ignore[no-any-return,no-untyped-call]


class _Noisy(torch.autograd.Function):
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
        keys: Tensor | None,
        site: int,
    ) -> Tensor:
        ctx.save_for_backward(x, A, B, G)
        ctx.work = segments, gates, keys, site  # type: ignore[attr-defined]
        out = y.clone()
        for s, g in pairs(segments, gates):
            drawn = down(x, A, s)
            if keys is not None:
                drawn = drawn + _noise(x, G, s, g, keys, site)
            add_segment_bmm_(out[None, s.start : s.stop], drawn * s.scale, B[None, s.first : s.last])
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, G = ctx.saved_tensors  # type: ignore[attr-defined]
        segments, gates, keys, site = ctx.work  # type: ignore[attr-defined]
        grad = grad.contiguous()
        dx, dA, dB, dG = (torch.zeros_like(tensor) for tensor in (x, A, B, G))
        for s, g in pairs(segments, gates):
            rows, dy = x[None, s.start : s.stop], grad[None, s.start : s.stop]
            drawn = down(x, A, s)
            dhidden = segment_bmm(dy, B[None, s.first : s.last].transpose(1, 2)) * s.scale
            if keys is not None:
                noise = _noise(x, G, s, g, keys, site)
                drawn, dread = drawn + noise, dhidden * noise / 2  # the slope of exp(r / 2) z is half of itself
                dG[g.first : g.last] += segment_bmm(dread.transpose(1, 2), rows)[0]
                add_segment_bmm_(dx[None, s.start : s.stop], dread, G[None, g.first : g.last])
            dB[s.first : s.last] += segment_bmm((drawn * s.scale).transpose(1, 2), dy)[0]
            dA[s.first : s.last] += segment_bmm(dhidden.transpose(1, 2), rows)[0]
            add_segment_bmm_(dx[None, s.start : s.stop], dhidden, A[None, s.first : s.last])
        return dx, grad, dA, dB, dG, None, None, None, None


def _noise(x: Tensor, G: Tensor, s: Segment, g: Segment, keys: Tensor, site: int) -> Tensor:
    """exp(x[s] G[g]^T / 2) z, [1, rows, ranks]; the exponent in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (torch.exp(down(x, G, g).to(wide) / 2) * normal_rows(keys[s.start : s.stop], site, g.size, wide)).to(x.dtype)
