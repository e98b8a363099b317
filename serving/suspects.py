"""Whose fault a failed step is: its streams are computed half by half, before anything else, until one is alone."""

from __future__ import annotations

from collections import deque

from polygraft.grafts.runtime.process import allocation_failed
from polygraft.serving.batch import Chunk
from polygraft.serving.sequence import Sequence


class Suspects:
    """Groups of chunks that the next steps compute, a group a step, with the rows of the step that failed."""

    def __init__(self) -> None:
        self._groups: deque[tuple[Chunk, ...]] = deque()

    def next(self) -> tuple[Chunk, ...]:
        """The group to compute now; empty when nobody is suspected."""
        return self._groups[0] if self._groups else ()

    def after_failure(self, chunks: tuple[Chunk, ...], error: Exception) -> Sequence | None:
        """After a step over `chunks` raised `error`: the stream whose fault it is, or None while that is not known.

        Whole streams leave the forward, half of them at a time. After an allocation failure one that is alone is tried
        with half of its rows, down to those that it must have at once.
        """
        for chunk in chunks:
            self.acquit(chunk.sequence)
        if len(chunks) > 1:
            half = len(chunks) // 2
            self._groups.extendleft((chunks[half:], chunks[:half]))
            return None
        (chunk,) = chunks
        fewer = max(chunk.sequence.min_chunk, chunk.rows // 2)
        if allocation_failed(error) and fewer < chunk.rows:
            self._groups.appendleft((Chunk(chunk.sequence, fewer),))
            return None
        return chunk.sequence

    def acquit(self, sequence: Sequence) -> None:
        """It was computed, or is over: nothing is held against it any more."""
        if not self._groups:
            return
        kept = (tuple(chunk for chunk in group if chunk.sequence is not sequence) for group in self._groups)
        self._groups = deque(group for group in kept if group)
