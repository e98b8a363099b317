"""Ground truth of the residual sum and its norm, in float32 (float64 stays float64)."""

import torch
from torch import Tensor


def residual_norm(
    x_TD: Tensor, update_TD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, *, centred: bool
) -> tuple[Tensor, Tensor]:
    """s = x + update and w (s - mean) / std + b, without the mean where it is not centred."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    s = x_TD.to(wide) + update_TD.to(wide)
    v = s - s.mean(-1, keepdim=True) if centred else s
    y = v / (v.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight_D is None else y * weight_D.to(wide)
    return s.to(x_TD.dtype), (y if bias_D is None else y + bias_D.to(wide)).to(x_TD.dtype)
