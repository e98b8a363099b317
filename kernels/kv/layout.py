"""How ragged rows become attention buckets: which sequences share a padded length, and where each of their rows
lies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")

GRAIN, FLOOR = 16, 32  # from 32 on, a member of the batched products is never below oneDNN's threshold


def outside(positions: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Whether a query does not see a key, bool, of positions that broadcast: what lies after it, and what lies `window`
    or more before it (None: nothing)."""
    after = keys > positions
    return after if window is None else after | (keys <= positions - window)


def bucket(length: int) -> int:
    return max(FLOOR, -(-length // GRAIN) * GRAIN)


@dataclass(frozen=True, slots=True)
class Sequence:
    """Rows [start, start + length) of the batch, seeing also `prefix_length` rows of the prefix stack from
    `prefix_first`. Keys are those of the same rows, or with a `source` (start, length) of rows of another batch."""

    start: int
    length: int
    prefix_first: int = 0
    prefix_length: int = 0
    source: tuple[int, int] | None = None

    @property
    def bucket(self) -> int:
        """Padded length: a function of the sequence alone, so that neighbours cannot change its arithmetic."""
        return bucket(self.prefix_length + self.length)

    @property
    def keys(self) -> tuple[int, int]:
        """(start, length) of the rows that it has keys of."""
        return self.source or (self.start, self.length)

    @property
    def width(self) -> int:
        """Padded count of keys."""
        return bucket(self.prefix_length + self.keys[1])


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
    """Sequences of one padded length L and one padded count of keys M: row indices into [rows; prefix rows; one zero
    row], queries [b, L] and keys [b, M]; which of the b L queries are `real` [n], and the batch `rows` [n] they are."""

    length: int
    width: int
    sequences: tuple[Sequence, ...]
    queries: Tensor
    keys: Tensor
    real: Tensor
    rows: Tensor
    causal: bool = True
    _hidden: dict[int | None, Tensor] = field(default_factory=dict)

    @cached_property
    def first_row(self) -> int | None:
        """Where the rows lie when they are all real, adjacent and without a prefix, so that they need no gathering."""
        start = self.sequences[0].start
        adjacent = all(
            (s.start, s.length, s.prefix_length, s.source) == (start + i * self.length, self.length, 0, None)
            for i, s in enumerate(self.sequences)
        )
        return start if adjacent else None

    def hidden(self, window: int | None = None) -> Tensor:
        """Keys that a query does not see: those after it and before its window, [L, L] bool; without causality the
        padding, [b, 1, M]."""
        if window not in self._hidden:
            keys = torch.arange(self.width, device=self.queries.device)
            if not self.causal:
                ends = torch.tensor([s.prefix_length + s.keys[1] for s in self.sequences], device=self.queries.device)
                self._hidden[window] = keys >= ends.view(-1, 1, 1)
            else:
                self._hidden[window] = outside(keys.unsqueeze(1), keys, window)
        return self._hidden[window]


@dataclass(frozen=True)
class Layout:
    """The sequences of one forward, in row order, over `rows` batch rows and `prefix_rows` stack rows; `key_rows` where
    their keys are another batch's. What is derived from it is kept, since all layers share it."""

    sequences: tuple[Sequence, ...]
    rows: int
    prefix_rows: int
    heads: int
    kv_heads: int
    causal: bool = True
    key_rows: int | None = None
    _derived: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False, compare=False)

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when `key` was asked for first; keys begin with the class or function they belong to."""
        if key not in self._derived:
            self._derived[key] = make()
        return cast(T, self._derived[key])

    def buckets(self, device: torch.device) -> tuple[Bucket, ...]:
        """The sequences by padded lengths, their indices on a device."""
        return self.derived((Bucket, device), lambda: self._buckets(device))

    def _buckets(self, device: torch.device) -> tuple[Bucket, ...]:
        by_size: dict[tuple[int, int], list[Sequence]] = defaultdict(list)
        for sequence in self.sequences:
            by_size[sequence.bucket, sequence.width].append(sequence)
        return tuple(self._bucket(*size, tuple(members), device) for size, members in sorted(by_size.items()))

    def _bucket(self, length: int, width: int, members: tuple[Sequence, ...], device: torch.device) -> Bucket:
        rows = self.rows if self.key_rows is None else self.key_rows
        queries = torch.full((len(members), length), self.rows + self.prefix_rows)
        keys = torch.full((len(members), width), rows + self.prefix_rows)
        for i, s in enumerate(members):
            p, (start, count) = s.prefix_length, s.keys
            queries[i, p : p + s.length] = torch.arange(s.start, s.start + s.length)
            keys[i, :p] = torch.arange(rows + s.prefix_first, rows + s.prefix_first + p)
            keys[i, p : p + count] = torch.arange(start, start + count)
        real = torch.cat([i * length + s.prefix_length + torch.arange(s.length) for i, s in enumerate(members)])
        queries, keys, real, batch = (index.to(device) for index in (queries, keys, real, queries.flatten()[real]))
        return Bucket(length, width, members, queries, keys, real, batch, self.causal)
