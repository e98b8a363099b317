"""Ground truth of the tokens op: one row after the other in float32 (float64 stays float64)."""

import torch
from torch import Tensor


def tokens(x_TD: Tensor, p_PD: Tensor, index_T: Tensor, add: bool) -> Tensor:
    """p[index[t]], or x[t] + p[index[t]], where there is an index; else x[t]. Differentiable by autograd."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    rows = []
    for x, index in zip(x_TD.to(wide), index_T.tolist(), strict=True):
        own = p_PD[index].to(wide) if index >= 0 else x
        rows.append(x + own if add and index >= 0 else own)
    return torch.stack(rows).to(x_TD.dtype)
