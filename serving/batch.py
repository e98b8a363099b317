"""The rows of one step: every chosen sequence's next tokens, laid out graft by graft, and the rows to sample."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from polygraft.cluster.model import GraftId
from polygraft.grafts.runtime.cache import PagedSequence
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.serving.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `rows` tokens of a sequence; they end with its newest token when a token is to be sampled."""

    sequence: Sequence
    rows: int

    @property
    def samples(self) -> bool:
        return self.rows == self.sequence.left


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward. `chunks` are in row order, `last` are the rows whose logits are wanted, one a chunk that samples."""

    chunks: tuple[Chunk, ...]
    rows: Rows
    sequences: tuple[PagedSequence, ...]
    last: tuple[int, ...]

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        return tuple(chunk.sequence for chunk in self.chunks if chunk.samples)

    @staticmethod
    def of(chunks: Items[Chunk], tables: Mapping[str, tuple[int, ...]], place: Mapping[GraftId, int]) -> Batch:
        """Lay out `chunks`; `tables` are the cache blocks by request, `place` the grafts' places in the step's stacks.

        Rows of one graft lie together, so that it is one span; rows of the bare backbone come first.
        """
        order = sorted(chunks, key=lambda chunk: (chunk.sequence.request.graft or "", chunk.sequence.request.id))
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        sequences: list[PagedSequence] = []
        last: list[int] = []
        for chunk in order:
            sequence, start = chunk.sequence, len(ids)
            ids += sequence.tokens[sequence.computed : sequence.computed + chunk.rows]
            positions += range(sequence.cached, sequence.cached + chunk.rows)
            sequences.append(PagedSequence(start, chunk.rows, sequence.cached, tables[sequence.request.id]))
            if chunk.samples:
                last.append(len(ids) - 1)
            if (graft := sequence.request.graft) is not None:
                first = spans.pop().start if spans and spans[-1].graft == place[graft] else start
                spans.append(Span(first, len(ids), place[graft]))
        rows = Rows(torch.tensor(ids), torch.tensor(positions), tuple(spans))
        return Batch(tuple(order), rows, tuple(sequences), tuple(last))
