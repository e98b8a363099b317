"""Ground truth of the nf4 op: W made whole, weight after weight, in float32 (float64 stays float64)."""

import torch
from torch import Tensor

from polygraft.kernels.branch import reference
from polygraft.kernels.common.segments import Segments
from polygraft.kernels.nf4.cost import BLOCK
from polygraft.kernels.nf4.levels import LEVELS


def linear(  # noqa: PLR0913
    x_TI: Tensor, codes_OH: Tensor, absmax_OK: Tensor, A_RI: Tensor, B_RO: Tensor, segments: Segments, act: str
) -> Tensor:
    """x W^T plus the branch; each W[o, i] rounded to x's dtype as the op does."""
    wide = torch.promote_types(x_TI.dtype, torch.float32)
    W = torch.empty(len(codes_OH), 2 * codes_OH.shape[1], dtype=wide)
    for i in range(W.shape[1]):
        nibble = codes_OH[:, i // 2] >> 4 if i % 2 == 0 else codes_OH[:, i // 2] & 15
        level = torch.tensor([LEVELS[n] for n in nibble.tolist()])
        W[:, i] = (level * absmax_OK[:, i // BLOCK]).to(x_TI.dtype)
    x, A, B = (tensor.to(wide) for tensor in (x_TI, A_RI, B_RO))
    return reference.branch(x, x @ W.T, A, B, segments, act).to(x_TI.dtype)
