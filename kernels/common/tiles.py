"""How segments become grids of tiles on a GPU: which program does which part of which segment, and in which launch.

A tile's extent is a function of its own segment, never of the batch, so that neighbours cannot change a row's
arithmetic (row invariance, docs/architecture.md). Segments that write the same rows go into successive waves, in
segment order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from polygraft.kernels.common.segments import Segment, Segments

HEIGHTS = (16, 64)  # rows of a tile: decoding, training and prefill; 64 is what a warp group's wgmma takes
WIDTHS = (16, 32, 64)  # ranks of a tile; 16 is the least that tensor cores multiply
FIELDS = 5  # columns of BranchTiles.table


@dataclass(frozen=True, slots=True)
class Grid:
    """One launch, of a program for every row (s, t, r) of `tiles` [programs, 3] int32: it does rows
    [height * t, height * (t + 1)) and ranks [width * r, width * (r + 1)) of segment s.
    """

    height: int
    width: int
    tiles: Tensor


@dataclass(frozen=True, slots=True)
class BranchTiles:
    """The launches of one op over some segments, all tensors on one device.

    table [S, FIELDS] int64: start, rows, first, size of every segment, and where its [rows, size] block begins in the
    flat storage of `hidden` elements (so ranks are not padded). scales [S] float64. Launches of `shrink` write blocks,
    those of `expand` batch rows (their programs loop over ranks), those of `outer` stack rows (looping over rows); in
    order.
    """

    table: Tensor
    scales: Tensor
    hidden: int
    shrink: tuple[Grid, ...]
    expand: tuple[Grid, ...]
    outer: tuple[Grid, ...]

    @staticmethod
    def of(segments: Segments, device: torch.device) -> BranchTiles:
        """Those of all segments that have rows and ranks, kept with the segments."""
        items = (s for s in segments if s.rows and s.size)
        return segments.derived((BranchTiles, device), lambda: BranchTiles.over(list(items), device))

    @staticmethod
    def over(items: Sequence[Segment], device: torch.device) -> BranchTiles:
        """Those of segments that have rows; those without ranks get tiles of rows only."""
        return _tiles(items, device)


def _tiles(items: Sequence[Segment], device: torch.device) -> BranchTiles:
    batch = waves([(s.start, s.stop) for s in items])
    stack = waves([(s.first, s.last) for s in items])
    one = [0] * len(items)
    return BranchTiles(
        table(items).to(device),
        torch.tensor([s.scale for s in items], dtype=torch.float64).to(device),
        sum(s.rows * s.size for s in items),
        grids(items, one, device, rows=True, ranks=True),
        grids(items, batch, device, rows=True, ranks=False),
        grids(items, stack, device, rows=False, ranks=True),
    )


def table(items: Sequence[Segment]) -> Tensor:
    """`BranchTiles.table`."""
    rows, offset = [], 0
    for s in items:
        rows.append((s.start, s.rows, s.first, s.size, offset))
        offset += s.rows * s.size
    return torch.tensor(rows, dtype=torch.int64).view(-1, FIELDS)


def grids(
    items: Sequence[Segment], order: Sequence[int], device: torch.device, *, rows: bool, ranks: bool
) -> tuple[Grid, ...]:
    """Launches by wave, every segment's in `order`, and tile extent; `rows` and `ranks` say which of the two are split
    over programs."""
    tiles: dict[tuple[int, int, int], list[tuple[int, int, int]]] = defaultdict(list)
    for index, (s, wave) in enumerate(zip(items, order, strict=True)):
        height, width = _extent(s.rows, HEIGHTS), _extent(s.size, WIDTHS)
        tiles[wave, height, width] += [
            (index, t, r)
            for t in range(-(-s.rows // height) if rows else 1)
            for r in range(-(-s.size // width) if ranks else 1)
        ]
    return tuple(
        Grid(height, width, torch.tensor(own, dtype=torch.int32).to(device))
        for (_, height, width), own in sorted(tiles.items())
    )


def _extent(size: int, extents: Sequence[int]) -> int:
    """The least extent that holds `size`, else the greatest."""
    return next((extent for extent in extents if size <= extent), extents[-1])


def waves(ranges: Sequence[tuple[int, int]]) -> list[int]:
    """A wave for every range: those of one wave are disjoint, and of two that meet the later one has the later wave."""
    edges = sorted(ranges)
    if all(a[1] <= b[0] for a, b in pairwise(edges)):
        return [0] * len(ranges)
    assigned: list[int] = []
    for i, (low, high) in enumerate(ranges):
        met = (wave for (a, b), wave in zip(ranges[:i], assigned, strict=True) if a < high and low < b)
        assigned.append(max(met, default=-1) + 1)
    return assigned
