"""Dropout whose masks are a function of what is dropped, not of when: a 32-bit counter hash, the same on every device
and split."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.common.segments import Segments

_M1, _M2 = 0x7FEB352D, 0x846CA68B - (1 << 32)  # lowbias32 (Wellons 2018): xor-shift-multiply rounds
CHANNEL = 0x9E3779B9 - (1 << 32)


def mix32(h: Tensor) -> Tensor:
    """Avalanche of int32 words; every input bit reaches every output bit."""
    h = (h ^ _shift(h, 16)) * _M1
    h = (h ^ _shift(h, 15)) * _M2
    return h ^ _shift(h, 16)


def combine(seed: Tensor, word: Tensor | int) -> Tensor:
    """Hash of (seed, word), elementwise over int32."""
    return mix32(mix32(seed + CHANNEL) ^ word)


def keep_mask(row_keys_N: Tensor, site_key: int, width: int, p: float) -> Tensor:
    """[N, width] bool, True with probability 1 - p; a function of (row key, site key, channel)."""
    rows = combine(row_keys_N, site_key).unsqueeze(1)
    channels = torch.arange(width, dtype=torch.int32, device=row_keys_N.device) * CHANNEL
    threshold = int(p * 2**32) - 2**31
    return mix32(rows ^ channels) >= threshold


def dropout(x_TI: Tensor, segments: Segments, row_keys_T: Tensor, site_key: int) -> Tensor:
    """x / (1 - p) where kept, 0 where dropped, on the rows of segments with a rate p; other rows pass unchanged.

    Where such segments overlap, the last one's rate holds for all that read those rows.
    """
    return _Dropout.apply(x_TI, segments, row_keys_T, site_key)  # type: ignore[no-any-return,no-untyped-call]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, segments: Segments, row_keys: Tensor, site_key: int) -> Tensor:
        ctx.work = (segments, row_keys, site_key)  # type: ignore[attr-defined]
        return _apply(x, segments, row_keys, site_key)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _apply(grad, *ctx.work), None, None, None  # type: ignore[attr-defined]


def _apply(x: Tensor, segments: Segments, row_keys: Tensor, site_key: int) -> Tensor:
    out = x.clone()
    for s in segments:
        if s.dropout:
            mask = keep_mask(row_keys[s.start : s.stop], site_key, x.shape[1], s.dropout)
            out[s.start : s.stop] = torch.where(mask, x[s.start : s.stop] / (1 - s.dropout), 0)
    return out


def _shift(h: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32 (torch's is arithmetic)."""
    return (h >> bits) & ((1 << (32 - bits)) - 1)
