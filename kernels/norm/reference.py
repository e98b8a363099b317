"""Ground truth of the norm op: materialise W + s B A and take its row norms in float32 (float64 stays float64)."""

import torch
from torch import Tensor


def row_norm(W_OI: Tensor, A_RI: Tensor, B_RO: Tensor, scale: float) -> Tensor:
    """||W + scale * B^T A|| of every output row, [O]."""
    wide = torch.promote_types(W_OI.dtype, torch.float32)
    return (W_OI.to(wide) + scale * B_RO.to(wide).T @ A_RI.to(wide)).square().sum(1).sqrt()
