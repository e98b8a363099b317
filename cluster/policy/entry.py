"""When a stream enters a replica's key-value cache; the engine's admission and the router both ask here."""

from __future__ import annotations


def blocks_for(slots: int, block_size: int) -> int:
    """Cache blocks that hold `slots` slots."""
    return -(-slots // block_size)


def may_enter(needed: int, *, running: int, free_blocks: int, max_streams: int) -> bool:
    """Whether one more stream, which fills `needed` blocks at once, may run with `running` others: each of them and
    the new one has a free block left to grow into (the test of S-LoRA, Sheng et al. 2023, one step ahead)."""
    return running < max_streams and free_blocks >= needed + running + 1


def ever_fits(slots: int, *, blocks: int, block_size: int) -> bool:
    """Whether a stream of `slots` slots may enter when nothing else runs and all `blocks` are free."""
    return may_enter(blocks_for(slots, block_size), running=0, free_blocks=blocks, max_streams=1)
