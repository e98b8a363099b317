"""How sequences become tiles of queries and of keys on a GPU. A tile's extent is a function of its own sequence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from polygraft.kernels.kv.layout import Continued, Layout

HEIGHTS = (16, 64)  # queries of a tile
KEYS = 32  # keys of a tile


@dataclass(frozen=True, slots=True)
class Grid:
    """One launch, of a program for every row (sequence, tile) of `tiles` [programs, 2] int32, a tile being `height`."""

    height: int
    tiles: Tensor


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """table [S, 5] int64: start, length, prefix_first, prefix_length of every sequence, and where its rows begin among
    the `prefix_rows` that hold each sequence's share of its prefix's gradient. The tiles of queries, of own keys and
    of prefix keys.
    """

    table: Tensor
    prefix_rows: int
    queries: tuple[Grid, ...]
    keys: tuple[Grid, ...]
    prefixes: tuple[Grid, ...]

    @staticmethod
    def of(layout: Layout, device: torch.device) -> AttentionTiles:
        """Those of all sequences, kept with the layout since all layers share it."""
        return layout.derived((AttentionTiles, device), lambda: _tiles(layout, device))


def _tiles(layout: Layout, device: torch.device) -> AttentionTiles:
    table, prefix_rows = [], 0
    for s in layout.sequences:
        table.append((s.start, s.length, s.prefix_first, s.prefix_length, prefix_rows))
        prefix_rows += s.prefix_length
    lengths, prefixes = [s.length for s in layout.sequences], [s.prefix_length for s in layout.sequences]
    return AttentionTiles(
        torch.tensor(table, dtype=torch.int64).view(-1, 5).to(device),
        prefix_rows,
        grids(lengths, device, height),
        grids(lengths, device, lambda _: KEYS),
        grids(prefixes, device, lambda _: KEYS),
    )


@dataclass(frozen=True, slots=True)
class PagedTiles:
    """Rows that continue cached sequences, for the attention of every layer of a forward.

    blocks [n] int64 of all sequences, one after the other. Of each layer, or one for all, a table [S, 5] int64: start,
    rows, before and unseen of every sequence, and where its blocks begin. The tiles of queries; one has the rows of all
    heads of a key head.
    """

    blocks: Tensor
    tables: tuple[Tensor, ...]
    queries: tuple[Grid, ...]

    @staticmethod
    def of(sequences: Sequence[Continued], unseen: Sequence[Sequence[int]], group: int) -> PagedTiles:
        """On the CPU, for `group` query heads of a key head; `unseen` as `Pages.hold` takes it."""
        first = list(accumulate((len(s.blocks) for s in sequences), initial=0))
        tables = {
            hidden: torch.tensor(
                [(s.start, s.rows, s.before, h, f) for s, h, f in zip(sequences, hidden, first, strict=False)]
            ).view(-1, 5)
            for hidden in map(tuple, unseen)
        }
        return PagedTiles(
            torch.tensor([block for s in sequences for block in s.blocks], dtype=torch.int64),
            tuple(tables[tuple(hidden)] for hidden in unseen),
            grids([s.rows * group for s in sequences], torch.device("cpu"), height),
        )

    def to(self, device: torch.device) -> PagedTiles:
        """The same on a device; what layers share is sent once."""
        tables = {id(table): table.to(device) for table in self.tables}
        return PagedTiles(
            self.blocks.to(device),
            tuple(tables[id(table)] for table in self.tables),
            tuple(Grid(grid.height, grid.tiles.to(device)) for grid in self.queries),
        )

    def table(self, layer: int) -> Tensor:
        return self.tables[layer if len(self.tables) > 1 else 0]


def height(rows: int) -> int:
    """The least tile that holds them, else the greatest."""
    return next((height for height in HEIGHTS if rows <= height), HEIGHTS[-1])


def grids(rows: Sequence[int], device: torch.device, extent: Callable[[int], int]) -> tuple[Grid, ...]:
    """Launches by tile extent, over as many tiles as the rows of each sequence fill."""
    tiles: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for index, count in enumerate(rows):
        size = extent(count)
        tiles[size] += [(index, tile) for tile in range(-(-count // size))]
    return tuple(
        Grid(size, torch.tensor(own, dtype=torch.int32).to(device)) for size, own in sorted(tiles.items()) if own
    )
