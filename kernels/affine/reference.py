"""Ground truth of the affine op: one segment after the other in float32 (float64 stays float64)."""

import torch
from torch import Tensor

from polygraft.kernels.common.segments import Segments


def affine(y_TD: Tensor, g_JD: Tensor | None, b_JD: Tensor | None, segments: Segments) -> Tensor:
    """y[s] = y[s] * g[s.first] + b[s.first], differentiable by autograd."""
    wide = torch.promote_types(y_TD.dtype, torch.float32)
    out = y_TD.to(wide)
    for s in segments:
        rows = out[s.start : s.stop]
        rows = rows if g_JD is None else rows * g_JD[s.first].to(wide)
        rows = rows if b_JD is None else rows + b_JD[s.first].to(wide)
        out = torch.cat([out[: s.start], rows, out[s.stop :]])
    return out.to(y_TD.dtype)
