"""Gaussian numbers that are a function of a key, not of when they are drawn: dropout's counter hash, Box-Muller."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from polygraft.kernels.common.dropout import combine

_UNIT = 2.0**-32


def normal(key: int, count: int, dtype: torch.dtype) -> Tensor:
    """z ~ N(0, I), [count]: a function of the key (32 bits, signed) and an element's place."""
    place = torch.arange(count, dtype=torch.int32)
    seed = torch.tensor(key, dtype=torch.int32)
    u, v = (combine(combine(seed, half), place).to(torch.float64) * _UNIT + 0.5 for half in (-1, -2))
    return ((-2 * (u + _UNIT / 2).log()).sqrt() * (2 * pi * v).cos()).to(dtype)
