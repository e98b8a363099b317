"""Gaussian numbers that are a function of a key, not of when they are drawn: dropout's counter hash, Box-Muller."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from polygraft.kernels.common.dropout import CHANNEL, combine, mix32

_UNIT = 2.0**-32


def normal(key: int | Tensor, count: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """z ~ N(0, I), [count]: a function of the key (32 bits, signed) and an element's place. A key that is a tensor lies
    where the numbers are made."""
    seed = key if isinstance(key, Tensor) else torch.tensor(key, dtype=torch.int32, device=device)
    place = torch.arange(count, dtype=torch.int32, device=seed.device)
    u, v = (combine(combine(seed, half), place).to(torch.float64) * _UNIT + 0.5 for half in (-1, -2))
    return _box_muller(u, v).to(dtype)


def normal_rows(row_keys_N: Tensor, site_key: int, width: int, dtype: torch.dtype) -> Tensor:
    """z ~ N(0, I), [N, width]: a function of (row key, site key, channel), as dropout's masks are."""
    channels = torch.arange(width, dtype=torch.int32, device=row_keys_N.device) * CHANNEL
    rows = combine(row_keys_N, site_key)
    u, v = (mix32(combine(rows, half).unsqueeze(1) ^ channels).to(torch.float64) * _UNIT + 0.5 for half in (-1, -2))
    return _box_muller(u, v).to(dtype)


def _box_muller(u: Tensor, v: Tensor) -> Tensor:
    return (-2 * (u + _UNIT / 2).log()).sqrt() * (2 * pi * v).cos()
