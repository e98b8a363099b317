"""The dense op: x W^T of frozen projections in bf16 on a CPU with AMX, with the branches beside them added before a
result is written (linear.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.kernels.common.segments import Segments
from polygraft.kernels.dense.library import library

ACTIVATIONS = ("identity", "relu", "gelu", "silu", "tanh")  # by their numbers in linear.cpp
ACROSS, SIDE, DEPTH = 4, 16, 32  # tiles across a panel, columns and terms of a tile
PANEL = ACROSS * SIDE


class Side(NamedTuple):
    """A branch beside projection `member`: A [R, in] and B [R, out] of all grafts as `branch` has them, contiguous."""

    member: int
    A: Tensor
    B: Tensor
    segments: Segments
    act: str


@dataclass(frozen=True, slots=True)
class Packed:
    """Frozen projections of one input as `linear` reads them: tiles of 16 pairs of terms by 16 columns, four side by
    side and all terms one after the other in a panel; every projection begins a panel, zeros beyond its last column.

    `places` are (first panel, first column, columns) of every projection, `table` the same for linear.cpp.
    """

    panels: Tensor
    widths: tuple[int, ...]
    in_features: int
    places: tuple[tuple[int, int, int], ...]
    table: ctypes.Array[ctypes.c_int64]

    @staticmethod
    def of(weights: Sequence[Tensor]) -> Packed:
        """Of W [out, in] for every projection; `supports` must hold."""
        panels, places, column, panel = [], [], 0, 0
        for W in weights:
            count = -(-len(W) // PANEL)
            places.append((panel, column, len(W)))
            panel, column = panel + count, column + len(W)
            whole = F.pad(W.detach(), (0, 0, 0, count * PANEL - len(W))).contiguous().view(torch.int32)
            tiles = whole.view(count, ACROSS, SIDE, W.shape[1] // DEPTH, DEPTH // 2)
            panels.append(tiles.permute(0, 3, 1, 4, 2).flatten())
        table = [field for place in places for field in place]
        array = (ctypes.c_int64 * len(table))(*table)
        return Packed(torch.cat(panels), tuple(map(len, weights)), weights[0].shape[1], tuple(places), array)

    def dense(self) -> Tensor:
        """W [out of all, in]."""
        tiles = self.panels.view(-1, self.in_features // DEPTH, ACROSS, DEPTH // 2, SIDE).permute(0, 2, 4, 1, 3)
        rows = tiles.reshape(-1, self.in_features // 2).view(torch.bfloat16)
        heights = [-(-width // PANEL) * PANEL for width in self.widths]
        return torch.cat([own[:width] for own, width in zip(rows.split_with_sizes(heights), self.widths)])


def supports(weight: Tensor) -> bool:
    """Whether this machine and a weight's dtype and shape are what the op is for."""
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.shape[1] % DEPTH == 0
        and library() is not None
    )


def linear(x_TI: Tensor, packed: Packed, beside: Sequence[Side] = ()) -> Tensor:
    """Semantics: out = x W^T, [T, out of all]; for every side's segments out[s.start:s.stop, its projection's columns]
    += s.scale * act(x[s.start:s.stop] A_s^T) B_s, act in float32.

    A result is one float32 sum, in an order that depends on its own segments alone (row invariance), rounded once; the
    hidden values of a branch are rounded to bf16 before B. Not differentiable.
    """
    compiled = library()
    assert compiled is not None and x_TI.dtype == torch.bfloat16 and x_TI.shape[1] == packed.in_features
    x = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    rows, stride, wide = x.shape[0], x.stride(0), sum(packed.widths)
    out = x.new_empty(rows, wide)
    fields: list[int] = []
    for member, A, B, segments, act in beside:
        _, column, width = packed.places[member]
        fields += (A.data_ptr(), B.data_ptr(), *_listed(segments), column, width, ACTIVATIONS.index(act))
    compiled.linear(
        *(x.data_ptr(), stride, rows, packed.in_features),
        *(packed.panels.data_ptr(), packed.table, len(packed.places)),
        *(out.data_ptr(), wide),
        *((ctypes.c_int64 * len(fields))(*fields), len(beside)),
        torch.get_num_threads(),
    )
    return out


class _Segment(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("start", "stop", "first", "last")), ("scale", ctypes.c_double)]


def _listed(segments: Segments) -> tuple[int, int]:
    """Where a work list lies as linear.cpp reads it, and its length; kept, since many sites share it."""
    kept: dict[str, tuple[int, int, object]] = segments.__dict__.setdefault("_compiled", {})
    if not kept:
        items = [_Segment(s.start, s.stop, s.first, s.last, s.scale) for s in segments]
        array = (_Segment * len(items))(*items)
        kept["list"] = (ctypes.addressof(array), len(items), array)
    return kept["list"][:2]
