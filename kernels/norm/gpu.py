"""The norm op on a GPU: two launches, and no matrix of W's size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polygraft.kernels.norm.programs import gram_kernel, norm_kernel

WIDTHS = (16, 32)  # ranks of a tile
DEPTH, FEATURES = 64, 64


def row_norm(base_sq_O: Tensor, AW_RO: Tensor, A_RI: Tensor, B_RO: Tensor, scale: float) -> Tensor:
    """As `op.row_norm`, on tensors of one GPU (or of the CPU under TRITON_INTERPRET=1).

    Float32 factors are multiplied in tensor cores as three tf32 products, whose error is near float32's.
    """
    A, B, AW = A_RI.contiguous(), B_RO.contiguous(), AW_RO.contiguous()
    rank, features = B.shape
    acc, precision = (tl.float64, "ieee") if base_sq_O.dtype == torch.float64 else (tl.float32, "tf32x3")
    width = next((width for width in WIDTHS if rank <= width), WIDTHS[-1])
    gram = torch.empty(rank, rank, dtype=base_sq_O.dtype, device=A.device)
    out = torch.empty_like(base_sq_O)
    tiles = triton.cdiv(rank, width)
    with torch.no_grad(), torch.cuda.device_of(A):  # type: ignore[no-untyped-call]
        gram_kernel[tiles, tiles](
            A, gram, rank, A.shape[1], A.stride(0), WIDTH=width, DEPTH=DEPTH, ACC=acc, PRECISION=precision
        )
        norm_kernel[(triton.cdiv(features, FEATURES),)](
            base_sq_O,
            AW,
            gram,
            B,
            out,
            torch.tensor([scale], dtype=torch.float64, device=A.device),
            rank,
            features,
            AW.stride(0),
            B.stride(0),
            WIDTH=width,
            FEATURES=FEATURES,
            ACC=acc,
            PRECISION=precision,
        )
    return out
