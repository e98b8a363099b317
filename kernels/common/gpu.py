"""What the ops' GPU paths do with their operands before a launch."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor


def adjacent(x: Tensor) -> Tensor:
    """x with adjacent columns; its row stride stays free."""
    return x if x.stride(1) == 1 else x.contiguous()


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What sums of this dtype are kept in."""
    return tl.float64 if dtype == torch.float64 else tl.float32
