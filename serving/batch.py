"""The rows of one step: every chosen sequence's next tokens, laid out graft by graft, and the rows to sample."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

from polygraft.cluster.model import GraftId
from polygraft.grafts.runtime.cache import PagedSequence
from polygraft.grafts.runtime.route import Rows
from polygraft.grafts.runtime.rows import RowBuilder
from polygraft.grafts.runtime.stacks import Stacks
from polygraft.serving.residency import Composition
from polygraft.serving.sampling import Draw
from polygraft.serving.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `rows` tokens of a sequence; once they reach its newest token, the one after it is sampled."""

    sequence: Sequence
    rows: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward. `chunks` are in row order, `last` are the rows of the newest tokens of `sampled`, `ends` those of
    the last tokens of `classified`."""

    chunks: tuple[Chunk, ...]
    rows: Rows
    stacks: Stacks
    sequences: tuple[PagedSequence, ...]
    sampled: tuple[Sequence, ...]
    last: tuple[int, ...]
    classified: tuple[Sequence, ...]
    ends: tuple[int, ...]

    @property
    def grafts(self) -> tuple[GraftId, ...]:
        grafts = {chunk.sequence.request.graft for chunk in self.chunks}
        return tuple(sorted(graft for graft in grafts if graft is not None))

    @property
    def draws(self) -> list[Draw]:
        """How the next tokens of `sampled` are chosen."""
        found = []
        for sequence in self.sampled:
            asked, index = sequence.request, sequence.generated
            barred = asked.eos_ids if index < asked.min_tokens else ()
            found.append(Draw(asked.temperature, asked.top_p, asked.seed, 0, index, asked.top_k, asked.min_p, barred))
        return found

    @staticmethod
    def of(chunks: Items[Chunk], tables: Mapping[str, tuple[int, ...]], composition: Composition) -> Batch:
        """Lay out `chunks`; `tables` are the cache blocks by request, `composition` holds all their grafts.

        Rows of one graft lie together, so that it is one span; rows of the bare backbone come first.
        """
        place = composition.place
        order = sorted(chunks, key=lambda chunk: (chunk.sequence.request.graft or "", chunk.sequence.request.id))
        builder = RowBuilder()
        sequences: list[PagedSequence] = []
        read: dict[bool, list[tuple[Sequence, int]]] = {False: [], True: []}  # by whether they classify
        for chunk in order:
            sequence, graft = chunk.sequence, chunk.sequence.request.graft
            own = builder.add(
                sequence.tokens[sequence.computed : sequence.computed + chunk.rows],
                graft=None if graft is None else place[graft],
                position=sequence.cached,
                prompt=sequence.prompt(chunk.rows),
            )
            bound = None if graft is None else composition.stacks.residents[place[graft]].graft
            prefix = (0, None) if bound is None else (bound.prefix_length, bound.prefix_layers)
            table = tables[sequence.request.id]
            sequences.append(PagedSequence(own.start, chunk.rows, sequence.cached, table, *prefix))
            if chunk.rows == sequence.left:
                read[sequence.request.classifies].append((sequence, own[-1]))
        return Batch(
            chunks=tuple(order),
            rows=builder.rows(),
            stacks=composition.stacks,
            sequences=tuple(sequences),
            sampled=tuple(sequence for sequence, _ in read[False]),
            last=tuple(row for _, row in read[False]),
            classified=tuple(sequence for sequence, _ in read[True]),
            ends=tuple(row for _, row in read[True]),
        )
