"""Ground truth of the residual sum and its norm, in float32 (float64 stays float64)."""

import torch
from torch import Tensor

from polygraft.kernels.residual_norm.op import Norm


def residual_norm(x_TD: Tensor, update_TD: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """s = x + update and w (s - mean) / std + b, without the mean where it is not centred."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    s = x_TD.to(wide) + update_TD.to(wide)
    v = s - s.mean(-1, keepdim=True) if norm.centred else s
    y = v / (v.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    y = y if norm.weight is None else y * norm.weight.to(wide)
    return s.to(x_TD.dtype), (y if norm.bias is None else y + norm.bias.to(wide)).to(x_TD.dtype)
