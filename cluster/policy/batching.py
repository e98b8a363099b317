"""Which streams an engine's next step computes, first come, first served: who leaves, who enters, how many rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polygraft.cluster.policy.entry import blocks_for, may_enter


@dataclass(frozen=True, slots=True)
class Running:
    """A stream in the cache: `left` rows to compute (1 while decoding), at least `min_chunk` of them in its next step,
    blocks `held` and `missing` for the next row."""

    id: str
    left: int
    held: int
    missing: int
    min_chunk: int = 1


@dataclass(frozen=True, slots=True)
class Waiting:
    """A stream without cache blocks: `left` rows to compute, at least `min_chunk` of them in its first step; with its
    graft's prefix they fill `slots` cache slots."""

    id: str
    left: int
    slots: int
    min_chunk: int = 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Do it in this order: `evicted` give up their blocks and go back to the head of the queue, `admitted` get blocks
    for all their slots, then `chunks` (stream, rows) are computed, those of admitted streams last."""

    evicted: tuple[str, ...]
    admitted: tuple[str, ...]
    chunks: tuple[tuple[str, int], ...]


def admit_streams(
    waiting: Sequence[Waiting],
    running: Sequence[Running],
    *,
    free_blocks: int,
    block_size: int,
    max_streams: int,
    rows: int,
) -> StepPlan:
    """The next step over `running` and `waiting`, both oldest first, with at most `rows` rows; a chunk whose
    `min_chunk` is more may go beyond, and is the last.

    Decoding streams get a row each, then prefills get chunks, then new streams are admitted while `may_enter` says so.
    The first that does not fit stops the queue. While streams are evicted nobody is admitted.
    """
    stay, evicted, free = _evict(running, free_blocks)
    free -= sum(stream.missing for stream in stay)
    chunks: list[tuple[str, int]] = []
    for stream in sorted(stay, key=lambda stream: stream.left > 1):  # stable: oldest first within decode and prefill
        if rows > 0:
            chunks.append((stream.id, max(stream.min_chunk, min(stream.left, rows))))
            rows -= chunks[-1][1]

    admitted: list[str] = []
    for candidate in waiting if not evicted else ():
        streams = len(stay) + len(admitted)
        needed = blocks_for(candidate.slots, block_size)
        if rows < 1 or not may_enter(needed, running=streams, free_blocks=free, max_streams=max_streams):
            break
        admitted.append(candidate.id)
        chunks.append((candidate.id, max(candidate.min_chunk, min(candidate.left, rows))))
        rows -= chunks[-1][1]
        free -= needed
    return StepPlan(evicted, tuple(admitted), tuple(chunks))


def _evict(running: Sequence[Running], free: int) -> tuple[list[Running], tuple[str, ...], int]:
    """Who stays, who leaves, youngest first, until the others' missing blocks are there, and the blocks then free."""
    stay = list(running)
    evicted: list[str] = []
    while stay and sum(stream.missing for stream in stay) > free:
        youngest = stay.pop()
        evicted.append(youngest.id)
        free += youngest.held
    return stay, tuple(evicted), free
