"""How ragged rows become attention buckets: which sequences share a padded length, and where each of their rows
lies."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

GRAIN, FLOOR = 16, 32  # from 32 on, a member of the batched products is never below oneDNN's threshold


def outside(positions: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Whether a query does not see a key, bool, of positions that broadcast: what lies after it, and what lies `window`
    or more before it (None: nothing)."""
    after = keys > positions
    return after if window is None else after | (keys <= positions - window)


@dataclass(frozen=True, slots=True)
class Sequence:
    """Rows [start, start + length) of the batch, seeing also `prefix_length` rows of the prefix stack from
    `prefix_first`."""

    start: int
    length: int
    prefix_first: int = 0
    prefix_length: int = 0

    @property
    def bucket(self) -> int:
        """Padded length: a function of the sequence alone, so that neighbours cannot change its arithmetic."""
        return max(FLOOR, -(-(self.prefix_length + self.length) // GRAIN) * GRAIN)


@dataclass(frozen=True, slots=True)
class Continued:
    """Batch rows [start, start + rows) after `before` cached positions, of which the first `unseen` are not seen;
    `blocks` hold the positions in order.
    """

    start: int
    rows: int
    before: int
    blocks: tuple[int, ...]
    unseen: int = 0


@dataclass(frozen=True)
class Bucket:
    """Sequences of one padded length L: row indices into [rows; prefix rows; one zero row], each [b, L]."""

    length: int
    sequences: tuple[Sequence, ...]
    queries: Tensor
    keys: Tensor
    causal: bool = True
    _hidden: dict[int | None, Tensor] = field(default_factory=dict)

    @cached_property
    def first_row(self) -> int | None:
        """Where the rows lie when they are all real, adjacent and without a prefix, so that they need no gathering."""
        start = self.sequences[0].start
        adjacent = all(
            (s.start, s.length, s.prefix_length) == (start + i * self.length, self.length, 0)
            for i, s in enumerate(self.sequences)
        )
        return start if adjacent else None

    def hidden(self, window: int | None = None) -> Tensor:
        """Keys that a query does not see: those after it and before its window, [L, L] bool; without causality the
        padding, [b, 1, L]."""
        if window not in self._hidden:
            keys = torch.arange(self.length, device=self.queries.device)
            if not self.causal:
                ends = torch.tensor([s.prefix_length + s.length for s in self.sequences], device=self.queries.device)
                self._hidden[window] = keys >= ends.view(-1, 1, 1)
            else:
                self._hidden[window] = outside(keys.unsqueeze(1), keys, window)
        return self._hidden[window]


@dataclass(frozen=True)
class Layout:
    """The sequences of one forward, in row order, over `rows` batch rows and `prefix_rows` stack rows."""

    sequences: tuple[Sequence, ...]
    rows: int
    prefix_rows: int
    heads: int
    kv_heads: int
    causal: bool = True

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        by_length: dict[int, list[Sequence]] = defaultdict(list)
        for sequence in self.sequences:
            by_length[sequence.bucket].append(sequence)
        return tuple(self._bucket(length, tuple(members)) for length, members in sorted(by_length.items()))

    def _bucket(self, length: int, members: tuple[Sequence, ...]) -> Bucket:
        zero = self.rows + self.prefix_rows
        queries = torch.full((len(members), length), zero)
        keys = torch.full((len(members), length), zero)
        for i, s in enumerate(members):
            p, n = s.prefix_length, s.length
            queries[i, p : p + n] = torch.arange(s.start, s.start + n)
            keys[i, :p] = torch.arange(self.rows + s.prefix_first, self.rows + s.prefix_first + p)
            keys[i, p : p + n] = queries[i, p : p + n]
        return Bucket(length, members, queries, keys, self.causal)
