"""Ground truth of the branch ops, plain, gated and noisy: one segment after the other in float32 (float64 stays so)."""

from collections.abc import Callable

import torch
from torch import Tensor

from polygraft.kernels.branch.activation import ACTIVATIONS
from polygraft.kernels.common.gate import Gate
from polygraft.kernels.common.segments import Segment, Segments


def branch(  # noqa: PLR0913
    x_TI: Tensor,
    y_TO: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    segments: Segments,
    act: str = "identity",
    a_R1: Tensor | None = None,
) -> Tensor:
    """y[s.start:s.stop] += s.scale * act(x[s.start:s.stop] @ A_s^T + a_s^T) @ B_s, differentiable by autograd."""
    wide = torch.promote_types(y_TO.dtype, torch.float32)
    out = y_TO.to(wide)
    for s in segments:
        hidden = x_TI[s.start : s.stop].to(wide) @ A_RI[s.first : s.last].to(wide).T
        hidden = hidden if a_R1 is None else hidden + a_R1[s.first : s.last].to(wide).T
        delta = s.scale * ACTIVATIONS[act](hidden) @ B_RO[s.first : s.last].to(wide)
        out = torch.cat([out[: s.start], out[s.start : s.stop] + delta, out[s.stop :]])
    return out.to(y_TO.dtype)


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
    """y[s] += s.scale * sum_i w_i act(x[s] A_i^T) B_i over the experts i of s, differentiable by autograd."""
    wide = torch.promote_types(y_TO.dtype, torch.float32)
    out = y_TO.to(wide)
    for s, g in zip(segments, gates, strict=True):
        x = x_TI[s.start : s.stop].to(wide)
        scores = x @ G_EI[g.first : g.last].to(wide).T
        count = gate.experts or g.size
        if gate.kind == "attention":
            hidden = ACTIVATIONS[act](x @ A_RI[s.first : s.last].to(wide).T)
            pairs = zip(scores.chunk(count, 1), hidden.chunk(count, 1), strict=True)
            scores = torch.stack([(read * own).sum(1) for read, own in pairs], 1)
        weights = torch.sigmoid(scores) if gate.kind == "sigmoid" else torch.softmax(scores, dim=1)
        if gate.kind == "softmax" and 0 < gate.top < g.size:
            kept = weights * (scores >= scores.topk(gate.top, dim=1).values[:, -1:])
            weights = kept / kept.sum(1, keepdim=True)
        delta = torch.zeros_like(out[s.start : s.stop])
        size = s.size // count
        for i in range(count):
            own = slice(s.first + i * size, s.first + (i + 1) * size)
            delta = delta + weights[:, i : i + 1] * ACTIVATIONS[act](x @ A_RI[own].to(wide).T) @ B_RO[own].to(wide)
        out = torch.cat([out[: s.start], out[s.start : s.stop] + s.scale * delta, out[s.stop :]])
    return out.to(y_TO.dtype)


def noisy(  # noqa: PLR0913
    x_TI: Tensor,
    y_TO: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    G_RI: Tensor,
    segments: Segments,
    gates: Segments,
    z_of: Callable[[Segment], Tensor],
) -> Tensor:
    """y[s] += s.scale * (x[s] A_s^T + exp(x[s] G_s^T / 2) * z_s) B_s with given z_s, differentiable by autograd."""
    wide = torch.promote_types(y_TO.dtype, torch.float32)
    out = y_TO.to(wide)
    for s, g in zip(segments, gates, strict=True):
        x = x_TI[s.start : s.stop].to(wide)
        mean, variance = x @ A_RI[s.first : s.last].to(wide).T, torch.exp(x @ G_RI[g.first : g.last].to(wide).T)
        delta = s.scale * (mean + variance.sqrt() * z_of(s).to(wide)) @ B_RO[s.first : s.last].to(wide)
        out = torch.cat([out[: s.start], out[s.start : s.stop] + delta, out[s.stop :]])
    return out.to(y_TO.dtype)
