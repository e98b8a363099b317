"""Ground truth of the dense op, in float32 (float64 stays float64)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from polygraft.kernels.branch import reference
from polygraft.kernels.dense.op import Work


def linear(x_TI: Tensor, weights: Sequence[Tensor], work: Work = ()) -> Tensor:
    """x W^T for all projections side by side, plus the branches, rounded to x's dtype at the end."""
    wide = torch.promote_types(x_TI.dtype, torch.float32)
    x = x_TI.to(wide)
    outputs = [x @ W.to(wide).T for W in weights]
    for side, segments in work:
        A, B = side.A.to(wide), side.B.to(wide)
        outputs[side.member] = reference.branch(x, outputs[side.member], A, B, segments, side.act)
    return torch.cat(outputs, dim=1).to(x_TI.dtype)
