"""Functions of one number whose bits do not depend on where in a tensor it lies.

torch computes the last elements of a tensor, and of each thread's share of it, by other functions than the rest. In
bf16 rounding hides it: sigmoid, silu and gelu of every number are the same (tests/kernels/test_pointwise.py). In
float32 their last bits differ, so there they are made of exp and erf, which have one function each. Float64 is held to
a tolerance.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x)) if x.dtype == torch.float32 else torch.sigmoid(x)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x)) if x.dtype == torch.float32 else F.silu(x)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / sqrt(2))) if x.dtype == torch.float32 else F.gelu(x)
