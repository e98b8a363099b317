"""The norm op: row norms of W + s B A without forming B A (DoRA; Liu et al. 2024, section 4.3 keeps them out of the
gradient).

The rescale by m / norm is then an affine op with g = m / norm.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_norm(base_sq_O: Tensor, AW_RO: Tensor, A_RI: Tensor, B_RO: Tensor, scale: float) -> Tensor:
    """Semantics: n[o] = ||W[o] + scale * sum_r B[r, o] A[r]||, [O], from ||W[o]||^2 and A W^T.

    base_sq [O] and AW = A @ W^T [R, O] come from the frozen linear, so any quantised layout of W will do. The
    arithmetic is in base_sq's dtype (float32, or float64). Not differentiable.
    ||W + sBA||^2 = ||W||^2 + 2 s (W A^T) . B + s^2 B (A A^T) . B.
    """
    if base_sq_O.is_cuda:
        from polygraft.kernels.norm import gpu  # Triton is loaded only where there is a GPU

        return gpu.row_norm(base_sq_O, AW_RO, A_RI, B_RO, scale)
    wide = base_sq_O.dtype
    with torch.no_grad():
        A, B = A_RI.to(wide), B_RO.to(wide)
        cross = (AW_RO.to(wide) * B).sum(0)
        square = ((A @ A.T) @ B * B).sum(0)
        return (base_sq_O + 2 * scale * cross + scale * scale * square).clamp_min(0).sqrt()
