"""The rows of one step: every chosen sequence's next tokens, laid out graft by graft, and the rows to sample."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from polygraft.cluster.model import GraftId
from polygraft.grafts.runtime.cache import PagedSequence
from polygraft.grafts.runtime.route import Input, Rows, Span
from polygraft.grafts.runtime.stacks import Stacks
from polygraft.serving.residency import Composition
from polygraft.serving.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `rows` tokens of a sequence; once they reach its newest token, the one after it is sampled."""

    sequence: Sequence
    rows: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward. `chunks` are in row order, `last` are the rows of the newest tokens of `sampled`."""

    chunks: tuple[Chunk, ...]
    rows: Rows
    stacks: Stacks
    sequences: tuple[PagedSequence, ...]
    sampled: tuple[Sequence, ...]
    last: tuple[int, ...]

    @property
    def grafts(self) -> tuple[GraftId, ...]:
        grafts = {chunk.sequence.request.graft for chunk in self.chunks}
        return tuple(sorted(graft for graft in grafts if graft is not None))

    @staticmethod
    def of(chunks: Items[Chunk], tables: Mapping[str, tuple[int, ...]], composition: Composition) -> Batch:
        """Lay out `chunks`; `tables` are the cache blocks by request, `composition` holds all their grafts.

        Rows of one graft lie together, so that it is one span; rows of the bare backbone come first.
        """
        place = composition.place
        order = sorted(chunks, key=lambda chunk: (chunk.sequence.request.graft or "", chunk.sequence.request.id))
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        sequences: list[PagedSequence] = []
        sampled: list[Sequence] = []
        last: list[int] = []
        inputs: list[Input] = []
        for chunk in order:
            sequence, start = chunk.sequence, len(ids)
            inputs += sequence.inputs(start, chunk.rows)
            ids += sequence.tokens[sequence.computed : sequence.computed + chunk.rows]
            positions += range(sequence.cached, sequence.cached + chunk.rows)
            table, graft = tables[sequence.request.id], sequence.request.graft
            bound = None if graft is None else composition.stacks.residents[place[graft]].graft
            prefix = (0, None) if bound is None else (bound.prefix_length, bound.prefix_layers)
            sequences.append(PagedSequence(start, chunk.rows, sequence.cached, table, *prefix))
            if chunk.rows == sequence.left:
                sampled.append(sequence)
                last.append(len(ids) - 1)
            if graft is not None:
                first = spans.pop().start if spans and spans[-1].graft == place[graft] else start
                spans.append(Span(first, len(ids), place[graft]))
        rows = Rows(torch.tensor(ids), torch.tensor(positions), tuple(spans), inputs=tuple(inputs))
        return Batch(tuple(order), rows, composition.stacks, tuple(sequences), tuple(sampled), tuple(last))
