"""The dense op: products of frozen projections in bf16 on a CPU, with the branches beside them added before a result
is written (linear.cpp), and their gradients."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.kernels.common.segments import Segments
from polygraft.kernels.compiled.calls import Call
from polygraft.kernels.dense.library import library
from polygraft.kernels.dense.pages import LargePages
from polygraft.kernels.dense.structures import BRANCH, CALL, Segment

ACTIVATIONS = ("identity", "relu", "gelu", "silu", "tanh")  # by their numbers in linear.cpp
MASK_DERIVATIVE = ("identity", "relu")  # those whose derivative is 1 where their value is not 0
ACROSS, SIDE, DEPTH = 4, 16, 32  # tiles across a panel, columns and terms of a tile
PANEL = ACROSS * SIDE
PANELS, ROWS, COLUMNS = range(3)  # layouts, by their numbers in linear.cpp
_PAGES = LargePages()


@dataclass(frozen=True)
class FusedBranch:
    """A branch that is computed with projection `member`: A [R, in] and B [R, out] of all grafts as `branch` has them,
    contiguous."""

    member: int
    A: Tensor
    B: Tensor
    act: str

    def __post_init__(self) -> None:
        assert self.A.is_contiguous() and self.B.is_contiguous()

    @cached_property
    def ranks(self) -> int:
        return min(len(self.A), len(self.B))

    @cached_property
    def pointers(self) -> tuple[int, int]:
        """Where A and B lie, for this op alone: other backends' tensors may have no address."""
        return self.A.data_ptr(), self.B.data_ptr()


Work = Sequence[tuple[FusedBranch, Segments]]  # branches and the segments that pass through them


@dataclass(frozen=True, slots=True)
class Weights:
    """Frozen projections of one input, `plain` as W [out of all, in] or `packed` as few rows read them fastest: tiles
    of 16 pairs of terms by 16 columns, four side by side and all terms one after the other in a panel; every projection
    begins a panel, zeros beyond its last column.

    `places` are (first panel, first column, columns) of every projection, `table` the same for linear.cpp.
    """

    data: Tensor
    layout: int
    in_features: int
    places: tuple[tuple[int, int, int], ...]
    table: array[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", array("q", [number for place in self.places for number in place]))

    @staticmethod
    def plain(W: Tensor, widths: Sequence[int]) -> Weights:
        return Weights(W, ROWS, W.shape[1], tuple(_places(widths)))

    @staticmethod
    def packed(weights: Sequence[Tensor]) -> Weights:
        """Of W [out, in] for every projection."""
        panels = []
        for W in weights:
            count = -(-len(W) // PANEL)
            whole = F.pad(W.detach(), (0, 0, 0, count * PANEL - len(W))).contiguous().view(torch.int32)
            tiles = whole.view(count, ACROSS, SIDE, W.shape[1] // DEPTH, DEPTH // 2)
            panels.append(tiles.permute(0, 3, 1, 4, 2).flatten())
        return Weights(_PAGES.copy(torch.cat(panels)), PANELS, weights[0].shape[1], tuple(_places(map(len, weights))))

    @property
    def out_features(self) -> int:
        _, column, width = self.places[-1]
        return column + width

    def dense(self) -> Tensor:
        """W [out of all, in]."""
        if self.layout == ROWS:
            return self.data
        tiles = self.data.view(-1, self.in_features // DEPTH, ACROSS, DEPTH // 2, SIDE).permute(0, 2, 4, 1, 3)
        rows = tiles.reshape(-1, self.in_features // 2).view(torch.bfloat16)
        return torch.cat([rows[panel * PANEL :][:width] for panel, _, width in self.places])


def supports(weight: Tensor) -> bool:
    """Whether this machine and a weight's dtype and shape are what the op is for, in both directions."""
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and not any(width % DEPTH for width in weight.shape)
        and library() is not None
    )


def linear(x_TI: Tensor, weights: Weights, work: Work = (), *, keep: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Semantics: out = x W^T, [T, out of all]; for every branch's segments out[s.start:s.stop, its projection's
    columns] += s.scale * act(x[s.start:s.stop] A_s^T) B_s, with act in float32. And with `keep`, of every branch, the
    values before B, for `transposed` and `outers`.

    A result is one float32 sum, in an order that depends on its own segments alone (row invariance), rounded once; the
    values between A and B are rounded to bf16. Not differentiable.
    """
    kept = [_kept(x_TI, segments) for _, segments in work] if keep else []
    return _call(x_TI, weights, _forward(x_TI.shape[0], weights, work, [values.data_ptr() for values in kept])), kept


def ready(x_TI: Tensor, weights: Weights, work: Work, out_TO: Tensor) -> Call:
    """The call that writes `linear` of these tensors, as they will be then, to `out`, contiguous."""
    compiled = library()
    assert compiled is not None and x_TI.stride(1) == 1 and out_TO.is_contiguous()
    call = _arguments(x_TI, weights, _forward(len(x_TI), weights, work), out_TO)
    address = ctypes.cast(compiled.linear, ctypes.c_void_p).value
    assert address is not None
    place, keeps = call.buffer_info()[0], (call, x_TI, weights, list(work), out_TO)
    rows, following = (place + CALL.index(name) * call.itemsize for name in ("rows", "next"))
    return Call("linear", compiled.linear, address, place, keeps, rows, following)


def transposed(
    dy_TO: Tensor, weights: Weights, work: Work = (), kept: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Semantics: dx = dy W + the sum over branches and their segments of dh_s A_s, [T, in], with dh_s = s.scale * dy[s]
    B_s^T where what `linear` kept of act(x A^T) is not 0; and dh of every branch, as `linear` keeps. For plain weights
    and the activations in MASK_DERIVATIVE."""
    assert weights.layout == ROWS
    dh = [_kept(dy_TO, segments) for _, segments in work]
    branches: list[int] = []
    for i, (branch, segments) in enumerate(work):
        _, column, width = weights.places[branch.member]
        where = _listed(segments, dy_TO.shape[0], branch.ranks)
        branches += (*branch.pointers[::-1], *where, column, width, 0, weights.in_features)
        branches += (0, dh[i].data_ptr(), 0 if branch.act == "identity" else kept[i].data_ptr())
    whole = Weights(weights.data, COLUMNS, weights.out_features, ((0, 0, weights.in_features),))
    return _call(dy_TO, whole, branches), dh


class Outer(NamedTuple):
    """h_s x[s.start:s.stop] of every segment, h_s [s.size, rows] its kept values: dA of dh and x, dB of what `linear`
    kept and dy; `ranks` are those of the whole stack."""

    kept: Tensor
    x_TD: Tensor
    segments: Segments
    ranks: int


def outers(items: Sequence[Outer]) -> list[Tensor]:
    """Semantics: of every item out[s.first:s.last] += h_s x[s.start:s.stop] for its segments, [ranks, D]. Sums stay
    inside a segment. All are computed together, since each alone is too little for several threads."""
    compiled = library()
    assert compiled is not None
    made: list[Tensor] = []
    call = array("q")
    for kept, x, segments, ranks in items:
        assert x.stride(1) == 1
        gaps = segments.gaps(ranks)
        out = (x.new_zeros if gaps is None else x.new_empty)(ranks, x.shape[1])
        for first, last in gaps or ():
            out[first:last].zero_()
        call.extend((kept.data_ptr(), x.data_ptr(), x.stride(0), x.shape[1]))
        call.extend((*_listed(segments, x.shape[0], ranks), out.data_ptr(), gaps is None))
        made.append(out)
    compiled.outers(call.buffer_info()[0], len(made), torch.get_num_threads())
    return made


def _forward(rows: int, weights: Weights, work: Work, kept: Sequence[int] = ()) -> list[int]:
    """The branches of a product as linear.cpp reads them, and where it keeps their values."""
    branches: list[int] = []
    for i, (branch, segments) in enumerate(work):
        _, column, width = weights.places[branch.member]
        where = _listed(segments, rows, branch.ranks)
        branches += (*branch.pointers, *where, 0, weights.in_features, column, width)
        branches += (ACTIVATIONS.index(branch.act), kept[i] if kept else 0, 0)
    return branches


def _call(x: Tensor, weights: Weights, branches: list[int]) -> Tensor:
    compiled = library()
    assert compiled is not None
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(x.shape[0], weights.out_features)
    call = _arguments(x, weights, branches, out)  # held until the call is over
    compiled.linear(call.buffer_info()[0])
    return out


def _arguments(x: Tensor, weights: Weights, branches: list[int], out: Tensor) -> array[int]:
    rows, terms = x.shape
    assert x.dtype == torch.bfloat16 and terms == weights.in_features
    head = (x.data_ptr(), x.stride(0), rows, terms, weights.data.data_ptr(), weights.layout)
    members = (weights.table.buffer_info()[0], len(weights.places))
    tail = (out.data_ptr(), weights.out_features, len(branches) // len(BRANCH), torch.get_num_threads(), 0)
    return array("q", (*head, *members, *tail, *branches))  # ctypes' own arrays take ten times as long to fill


def _places(widths: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    panel = column = 0
    for width in widths:
        yield panel, column, width
        panel, column = panel - -width // PANEL, column + width


class _List(NamedTuple):
    """A work list as linear.cpp reads it, the rows and ranks that it needs, how many values between A and B it keeps,
    and whether some of their places are no row's."""

    items: ctypes.Array[Segment]
    rows: int
    ranks: int
    kept: int
    gaps: bool


def _listed(segments: Segments, rows: int, ranks: int) -> tuple[int, int]:
    """Where a work list lies, and its length; made once, since many sites share it. IndexError beyond rows or ranks."""
    listed = _list_of(segments)
    if listed.rows > rows or listed.ranks > ranks:
        raise IndexError(f"segments of {listed.rows} rows and {listed.ranks} ranks for {rows} rows and {ranks} ranks")
    return ctypes.addressof(listed.items), len(listed.items)


def _list_of(segments: Segments) -> _List:
    return segments.derived(_List, lambda: _list(segments))


def _list(segments: Segments) -> _List:
    items = [Segment(s.start, s.stop, s.first, s.last, s.scale) for s in segments]
    stop, last = max((s.stop for s in segments), default=0), max((s.last for s in segments), default=0)
    kept = sum(s.size * -(-s.rows // DEPTH) * DEPTH for s in segments)
    return _List((Segment * len(items))(*items), stop, last, kept, any(s.rows % DEPTH for s in segments))


def _kept(like: Tensor, segments: Segments) -> Tensor:
    """Room for the values between A and B: [ranks, rows in whole tiles of terms] of each segment in turn, 0 beyond its
    rows."""
    listed = _list_of(segments)
    return (like.new_zeros if listed.gaps else like.new_empty)(listed.kept)
