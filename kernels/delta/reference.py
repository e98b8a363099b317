"""Ground truth of the delta op: one segment after the other in float32 (float64 stays float64)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from polygraft.kernels.common.segments import Segments
from polygraft.kernels.delta.op import Generate


def delta(x_TI: Tensor, y_TO: Tensor, t_N1: Tensor, segments: Segments, generate: Mapping[int, Generate]) -> Tensor:
    """y[s] += s.scale x[s] W_s^T, differentiable by autograd."""
    wide = torch.promote_types(x_TI.dtype, torch.float32)
    out = y_TO.to(wide)
    for s in segments:
        W = generate[s.first](t_N1[s.first : s.last]).to(wide)
        rows = out[s.start : s.stop] + s.scale * (x_TI[s.start : s.stop].to(wide) @ W.T)
        out = torch.cat([out[: s.start], rows, out[s.stop :]])
    return out.to(y_TO.dtype)
