"""Ground truth of the swiglu op, in float32 (float64 stays float64)."""

import torch
from torch import Tensor


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """gate / (1 + e^-gate) * up."""
    wide = torch.promote_types(gate_TF.dtype, torch.float32)
    gate = gate_TF.to(wide)
    return (gate / (1 + (-gate).exp()) * up_TF.to(wide)).to(gate_TF.dtype)
