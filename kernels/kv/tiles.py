"""How sequences become tiles of queries and of keys on a GPU. A tile's extent is a function of its own sequence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polygraft.kernels.kv.layout import Layout

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
    the `partial` rows that hold each sequence's share of its prefix's gradient. The tiles of queries, of own keys and
    of prefix keys.
    """

    table: Tensor
    partial: int
    queries: tuple[Grid, ...]
    keys: tuple[Grid, ...]
    prefixes: tuple[Grid, ...]

    @staticmethod
    def of(layout: Layout, device: torch.device) -> AttentionTiles:
        """Those of all sequences, kept with the layout since all layers share it."""
        return layout.derived((AttentionTiles, device), lambda: _tiles(layout, device))


def _tiles(layout: Layout, device: torch.device) -> AttentionTiles:
    table, partial = [], 0
    for s in layout.sequences:
        table.append((s.start, s.length, s.prefix_first, s.prefix_length, partial))
        partial += s.prefix_length
    lengths, prefixes = [s.length for s in layout.sequences], [s.prefix_length for s in layout.sequences]
    return AttentionTiles(
        torch.tensor(table, dtype=torch.int64).view(-1, 5).to(device),
        partial,
        grids(lengths, device, height),
        grids(lengths, device, lambda _: KEYS),
        grids(prefixes, device, lambda _: KEYS),
    )


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
        Grid(size, torch.tensor(found, dtype=torch.int32).to(device)) for size, found in sorted(tiles.items()) if found
    )
