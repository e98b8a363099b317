"""How segments become launches on a GPU for the sparse and the rotate op. Unlike ranks, entries are too many for a list
of their tiles: a launch is as wide as its longest segment needs, and the others' programs beyond their end have no
work."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from polygraft.kernels.common.segments import Segments
from polygraft.kernels.common.tiles import Grid, grids, table, waves


@dataclass(frozen=True, slots=True)
class EntryLaunches:
    """table [S, 5] and scales [S] as `BranchTiles` has them; `batch` are launches that write batch rows, in order.

    `edges` [G, 2] int64 are the distinct (first, last), and ranges [S] int64 says which of them a segment has. `stack`
    are launches that write stack rows, in order: their segments [n] int64, and the most entries that one of them has.
    """

    table: Tensor
    scales: Tensor
    batch: tuple[Grid, ...]
    stack: tuple[tuple[Tensor, int], ...]
    ranges: Tensor
    edges: Tensor

    @staticmethod
    def of(segments: Segments, device: torch.device) -> EntryLaunches:
        """Those of all segments that have rows and entries, kept with the segments."""
        return segments.derived((EntryLaunches, device), lambda: _launches(segments, device))


def _launches(segments: Segments, device: torch.device) -> EntryLaunches:
    items = [s for s in segments if s.rows and s.size]
    batch = waves([(s.start, s.stop) for s in items])
    edges = list(dict.fromkeys((s.first, s.last) for s in items))
    stack: dict[int, list[int]] = defaultdict(list)
    for index, wave in enumerate(waves([(s.first, s.last) for s in items])):
        stack[wave].append(index)
    return EntryLaunches(
        table(items).to(device),
        torch.tensor([s.scale for s in items], dtype=torch.float64).to(device),
        grids(items, batch, device, rows=True, ranks=False),
        tuple(
            (torch.tensor(own).to(device), max(items[index].size for index in own)) for _, own in sorted(stack.items())
        ),
        torch.tensor([edges.index((s.first, s.last)) for s in items], dtype=torch.int64).to(device),
        torch.tensor(edges, dtype=torch.int64).view(-1, 2).to(device),
    )
