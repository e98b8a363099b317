"""Ground truth of the branch op: one segment after the other in float32 (float64 stays float64)."""

import torch
from torch import Tensor

from polygraft.kernels.branch.activation import ACTIVATIONS
from polygraft.kernels.common.segments import Segments


def branch(
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
