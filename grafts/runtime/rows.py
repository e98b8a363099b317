"""The rows of one forward, laid out sequence by sequence, flat and without padding: what training, serving and starting
values share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.embedding import virtual_ids
from polygraft.grafts.runtime.route import Input, Rows, Span
from polygraft.grafts.sites import ModelShape
from polygraft.kernels.common.dropout import combine


class RowBuilder:
    """Sequences one after the other; those of one graft that follow each other are one span. An encoder's are in
    `source`, as many.

    `sequences` are their first rows and how many rows they have.
    """

    def __init__(self, source: RowBuilder | None = None) -> None:
        self.sequences: list[tuple[int, int]] = []
        self._source = source
        self._ids: list[int] = []
        self._positions: list[int] = []
        self._spans: list[Span] = []
        self._inputs: list[Input] = []
        self._draws: list[tuple[int, int] | None] = []
        self._embeds: list[Tensor] = []

    def add(
        self,
        tokens: Sequence[int] | Tensor,
        *,
        graft: int | None = None,
        position: int = 0,
        virtual: int = 0,
        prompt: Input | None = None,
        draw: tuple[int, int] | None = None,
    ) -> range:
        """Rows for so many `virtual` tokens of resident `graft` and then for `tokens`, whose rows are returned; the
        first is at `position`.

        `tokens` are ids, or as a tensor [count, hidden] the embeddings in their place, of all sequences then. `prompt`
        says which of them are a prompt's, counted from the first. `draw` is what random numbers hang on beside the
        place in the sequence: a key and the sample's number.
        """
        start = len(self._ids)
        self._ids += virtual_ids(virtual)
        if isinstance(tokens, Tensor):
            self._embeds.append(F.pad(tokens, (0, 0, virtual, 0)))
            self._ids += [0] * len(tokens)
        else:
            self._ids += tokens
        stop = len(self._ids)
        self.sequences.append((start, stop - start))
        self._positions += range(position, position + stop - start)
        self._draws.append(draw)
        if graft is not None:
            again = self._spans and (self._spans[-1].graft, self._spans[-1].stop) == (graft, start)
            self._spans.append(Span(self._spans.pop().start if again else start, stop, graft))
        if prompt is not None:
            first = start + virtual
            self._inputs.append(prompt._replace(start=first + prompt.start, stop=first + prompt.stop))
        return range(start + virtual, stop)

    def rows(self) -> Rows:
        return Rows(
            torch.tensor(self._ids, dtype=torch.long),
            torch.tensor(self._positions, dtype=torch.long),
            tuple(self._spans),
            dropout_keys=self._dropout_keys(),
            inputs_embeds=torch.cat(self._embeds) if self._embeds else None,
            source=self._source.rows() if self._source is not None else None,
            inputs=tuple(self._inputs),
        )

    def attention(self, shape: ModelShape) -> WholeSequences:
        """How they attend where each is here from its first row to its last."""
        source = self._source.sequences if self._source is not None else ()
        return WholeSequences(tuple(self.sequences), shape, tuple(source))

    def _dropout_keys(self) -> Tensor | None:
        if not any(self._draws):
            return None
        pairs = zip(self._draws, self.sequences, strict=True)
        return torch.cat([dropout_keys(draw, count) for draw, (_, count) in pairs])


def dropout_keys(draw: tuple[int, int] | None, rows: int) -> Tensor:
    """Keys [rows] int32 of a sequence that draws with a key and its sample's number; 0 where it does not draw."""
    tokens = torch.arange(rows, dtype=torch.int32)
    if draw is None:
        return torch.zeros_like(tokens)
    key, number = draw
    sample = combine(torch.tensor(key, dtype=torch.int32), number)
    return combine(sample.expand(rows), tokens)
