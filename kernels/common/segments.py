"""Which rows of a batch meet which rows of a weight stack; the work list that every op receives."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, stop) of the batch use stack rows [first, last) with a factor and, in training, a dropout rate."""

    start: int
    stop: int
    first: int
    last: int
    scale: float = 1.0
    dropout: float = 0.0

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def size(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Run:
    """`count` consecutive segments of one shape, adjacent in the batch and in the stack: one batched matmul."""

    start: int
    rows: int
    first: int
    size: int
    scales: tuple[float, ...]

    @property
    def count(self) -> int:
        return len(self.scales)

    def batch(self, x_TD: Tensor) -> Tensor:
        """View of the run's batch rows, [count, rows, D]."""
        return torch.unflatten(x_TD.narrow(0, self.start, self.count * self.rows), 0, (self.count, self.rows))

    def stack(self, w_RD: Tensor) -> Tensor:
        """View of the run's stack rows, [count, size, D]."""
        return torch.unflatten(w_RD.narrow(0, self.first, self.count * self.size), 0, (self.count, self.size))

    def scaled(self, x_NMD: Tensor) -> Tensor:
        """Every segment's rows [count, rows, D] times its factor, which is not rounded to x's dtype before."""
        if len(set(self.scales)) == 1:
            return x_NMD * self.scales[0]
        wide = torch.promote_types(x_NMD.dtype, torch.float32)
        return (x_NMD * torch.tensor(self.scales, dtype=wide, device=x_NMD.device).view(-1, 1, 1)).to(x_NMD.dtype)


@dataclass(frozen=True)
class Segments:
    """All segments of one op at one site; may overlap, need not cover the batch. What is derived from them is kept,
    since many sites share them."""

    items: tuple[Segment, ...]
    _derived: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when `key` was asked for first; keys begin with the class or function they belong to."""
        if key not in self._derived:
            self._derived[key] = make()
        return cast(T, self._derived[key])

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        return tuple(_runs(self.items))

    @property
    def dropped(self) -> bool:
        return any(segment.dropout for segment in self.items)

    @cached_property
    def disjoint(self) -> bool:
        """Whether no row of the batch is in two segments."""
        spans = sorted((segment.start, segment.stop) for segment in self.items if segment.rows and segment.size)
        return all(a[1] <= b[0] for a, b in pairwise(spans))

    def covers(self, stack_rows: int) -> bool:
        """Whether the segments touch every stack row just once, so that a gradient can be written without clearing."""
        return self.gaps(stack_rows) == ()

    def gaps(self, stack_rows: int) -> tuple[tuple[int, int], ...] | None:
        """Stack rows [first, last) that no segment touches, where all others are touched just once; else None."""
        return self.derived((Segments.gaps, stack_rows), lambda: self._gaps(stack_rows))

    def _gaps(self, stack_rows: int) -> tuple[tuple[int, int], ...] | None:
        edges = sorted((segment.first, segment.last) for segment in self.items if segment.rows and segment.size)
        pairs = list(pairwise([(0, 0), *edges, (stack_rows, stack_rows)]))
        if any(a[1] > b[0] for a, b in pairs):
            return None
        return tuple((a[1], b[0]) for a, b in pairs if a[1] < b[0])

    def scales_TR(self, rows: int, stack_rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(factor, foreign) of batch row by stack row, both [rows, stack_rows]; kept, since many sites share them.

        The factor has like's dtype where that holds every value, else float32 or wider.
        """
        return self.derived(("scales", rows, stack_rows, like.dtype), lambda: self._scales(rows, stack_rows, like))

    def _scales(self, rows: int, stack_rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(like.dtype, torch.float32)
        factor = torch.zeros(rows, stack_rows, dtype=wide, device=like.device)
        for s in self.items:
            factor[s.start : s.stop, s.first : s.last] += s.scale
        narrow = factor.to(like.dtype)
        return (narrow if torch.equal(narrow.to(wide), factor) else factor), factor == 0

    def index_T(self, rows: int, stack_rows: int, device: torch.device) -> Tensor:
        """Stack row of every batch row, `stack_rows` where none; for ops with one stack row a segment."""
        return self.derived(("index", rows, stack_rows), lambda: self._index(rows, stack_rows, device))

    def _index(self, rows: int, stack_rows: int, device: torch.device) -> Tensor:
        index = torch.full((rows,), stack_rows, dtype=torch.long)
        for s in self.items:
            index[s.start : s.stop] = s.first
        return index.to(device)


def _runs(items: Iterable[Segment]) -> Iterator[Run]:
    pending: list[Segment] = []
    for item in items:
        if item.rows == 0 or item.size == 0:
            continue
        if pending and not _adjacent(pending[-1], item):
            yield _run(pending)
            pending = []
        pending.append(item)
    if pending:
        yield _run(pending)


def _adjacent(a: Segment, b: Segment) -> bool:
    return (a.stop, a.last, a.rows, a.size) == (b.start, b.first, b.rows, b.size)


def _run(items: list[Segment]) -> Run:
    head = items[0]
    return Run(head.start, head.rows, head.first, head.size, tuple(item.scale for item in items))
