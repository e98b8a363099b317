"""Rows that follow the same tokens, computed once for all sequences of a forward that begin with them: templates and
questions of examples.

What such rows are does not depend on the sequence where neither the backbone nor the graft reads ahead
(`BoundGraft.reads_ahead`). Attention alone reads other rows; it is given every sequence whole, so that its numbers, and
with them everybody's, are those of a forward in which each has rows of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.padding import padded
from polygraft.grafts.runtime.route import RouteTable, Rows, Span
from polygraft.grafts.runtime.stack import StackSlices
from polygraft.kernels.common.segments import Segments
from polygraft.kernels.kv.scores import Scores

Runs = tuple[tuple[int, int], ...]  # [start, stop) of rows that follow each other, one after the other


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Attention of `whole` sequences over rows that several may have: `taken` are those of all sequences, one after the
    other and under `spans`; of these `first` are the rows again, each once, and any of them for padding."""

    whole: WholeSequences
    taken: Runs
    first: Runs
    spans: tuple[Span, ...]
    _work_lists: dict[StackSlices, Segments] = field(default_factory=dict)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, route: RouteTable, scores: Scores) -> Tensor:
        return _joined(self.whole(layer, *self._apart(q, k, v), route=self._route(route), scores=scores), self.first)

    def with_sums(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, route: RouteTable, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        out, sums = self.whole.with_sums(layer, *self._apart(q, k, v), route=self._route(route), scores=scores)
        return _joined(out, self.first), _joined(sums, self.first)

    def _apart(self, *rows: Tensor) -> Sequence[Tensor]:
        return [_joined(x, self.taken) for x in rows]

    def _route(self, route: RouteTable) -> RouteTable:
        return replace(route, spans=self.spans, work_lists=self._work_lists)


def rows_of(sequences: Iterable[Sequence[int]]) -> list[int]:
    """The row of every token, sequence after sequence, where those that follow the same tokens have one."""
    found: dict[tuple[int, int], int] = {}  # by the row before and the token
    taken: list[int] = []
    for tokens in sequences:
        before = -1
        for token in tokens:
            before = found.setdefault((before, token), len(found))
            taken.append(before)
    return taken


def shared(rows: Rows, whole: WholeSequences) -> tuple[Rows, SharedRows, Tensor]:
    """The rows of one graft's sequences with none of them twice, how they attend, and the row [n] of each that was
    given."""
    ids, (span,) = rows.ids.tolist(), rows.spans
    taken = rows_of(ids[start : start + length] for start, length in whole.sequences)
    places = {row: place for place, row in reversed(list(enumerate(taken)))}
    first = [places[row] for row in range(len(places))]
    few = Rows(rows.ids[first], rows.positions[first], (replace(span, stop=len(first)),))
    padding = range(padded(len(first)) - len(first))
    return few, SharedRows(whole, _runs(taken), _runs([*first, *padding]), rows.spans), torch.tensor(taken)


def _runs(rows: Sequence[int]) -> Runs:
    begins = [i for i, row in enumerate(rows) if not i or row != rows[i - 1] + 1]
    return tuple((rows[i], rows[i] + stop - i) for i, stop in pairwise([*begins, len(rows)]))


def _joined(x: Tensor, runs: Runs) -> Tensor:
    return torch.cat([x[start:stop] for start, stop in runs])  # by one thread: ten times as fast as by an index
