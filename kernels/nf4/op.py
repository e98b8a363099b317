"""The nf4 op: x W^T with W in NF4 (QLoRA; Dettmers et al. 2023, arXiv 2305.14314), and a branch added before the result
is written."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.kernels.branch.op import serve_branch_
from polygraft.kernels.common.segments import Segments
from polygraft.kernels.nf4.cost import BLOCK
from polygraft.kernels.nf4.levels import LEVELS


def linear(  # noqa: PLR0913
    x_TI: Tensor,
    codes_OH: Tensor,
    absmax_OK: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    segments: Segments,
    act: str = "identity",
) -> Tensor:
    """Semantics: out = x W^T, W[o, i] = LEVELS[n(o, i)] * absmax[o, i // 64] rounded to x's dtype; out[s.start:s.stop]
    += s.scale * act(x[s.start:s.stop] A_s^T) B_s.

    n(o, i) is the high nibble of codes[o, i // 2] for even i and the low one for odd i: bitsandbytes' layout of a
    matrix whose rows are whole blocks. codes [out, in / 2] uint8, absmax [out, in / 64] float32; A and B as `branch`
    has them.
    Segments must not overlap. Not differentiable.
    """
    assert x_TI.shape[1] == 2 * codes_OH.shape[1] == BLOCK * absmax_OK.shape[1], (x_TI.shape, codes_OH.shape)
    if x_TI.is_cuda:
        from polygraft.kernels.nf4 import gpu  # Triton is loaded only where there is a GPU

        return gpu.linear(x_TI, codes_OH, absmax_OK, A_RI, B_RO, segments, act)
    with torch.no_grad():
        out = F.linear(x_TI, dequantise(codes_OH, absmax_OK, x_TI.dtype))
        if segments.runs:
            serve_branch_(out, x_TI, A_RI, B_RO, segments, act)
        return out


def dequantise(codes_OH: Tensor, absmax_OK: Tensor, dtype: torch.dtype) -> Tensor:
    """W [out, in]."""
    levels = torch.tensor(LEVELS, device=codes_OH.device)
    nibbles = torch.stack([codes_OH >> 4, codes_OH & 15], dim=2).flatten(1).long()
    return (torch.unflatten(levels[nibbles], 1, (-1, BLOCK)) * absmax_OK.unsqueeze(2)).flatten(1).to(dtype)
