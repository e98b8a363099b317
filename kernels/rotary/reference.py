"""Ground truth of rotary embedding, in float32 (float64 stays float64): pairs as complex numbers."""

import torch
from torch import Tensor


def turned(x_THD: Tensor, angles_TN: Tensor) -> Tensor:
    """Of every head x, the numbers (x[i], x[i + n]) turned by angle i in the plane, n the count of angles; the rest as
    it is."""
    wide = torch.promote_types(x_THD.dtype, torch.float32)
    n = angles_TN.shape[1]
    x, phase = x_THD.to(wide), angles_TN.to(wide).unsqueeze(1)
    plane = torch.complex(x[..., :n], x[..., n : 2 * n]) * torch.polar(torch.ones_like(phase), phase)
    return torch.cat((plane.real, plane.imag, x[..., 2 * n :]), dim=-1).to(x_THD.dtype)
