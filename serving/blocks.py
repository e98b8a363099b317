"""Which blocks of the key-value cache are free and who holds the others; the tensors are the runtime's."""

from __future__ import annotations

from polygraft.cluster.policy.entry import blocks_for

BLOCK_SIZE = 16  # tokens; the runtime gathers contexts in multiples of it


class Blocks:
    """Blocks 1 to `count - 1`; block 0 is reserved, always zero, and stands for "no block" in page tables.

    Holders are request ids. Not thread-safe: the engine thread owns it.
    """

    def __init__(self, *, count: int, block_size: int, bytes_per_block: int) -> None:
        if count < 2 or block_size < 1:
            raise ValueError(f"blocks: {count} of {block_size} tokens leave none to give; raise serve.kv_bytes")
        self.block_size = block_size
        self.bytes_per_block = bytes_per_block
        self._count = count
        self._free = list(range(count - 1, 0, -1))
        self._held: dict[str, list[int]] = {}

    @property
    def total(self) -> int:
        return self._count - 1

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def used_bytes(self) -> int:
        return (self.total - len(self._free)) * self.bytes_per_block

    def missing(self, holder: str, slots: int) -> int:
        """Blocks `holder` still lacks to hold `slots` slots."""
        return max(0, blocks_for(slots, self.block_size) - len(self._held.get(holder, ())))

    def can_allocate(self, blocks: int) -> bool:
        return blocks <= len(self._free)

    def allocate(self, holder: str, blocks: int) -> tuple[int, ...]:
        """Give `holder` that many more blocks and return the new ones; ask `can_allocate` first."""
        assert self.can_allocate(blocks), f"{blocks} blocks asked, {len(self._free)} free"
        new = [self._free.pop() for _ in range(blocks)]
        if new:
            self._held.setdefault(holder, []).extend(new)
        return tuple(new)

    def table(self, holder: str) -> tuple[int, ...]:
        """The holder's blocks in the order of its tokens."""
        return tuple(self._held.get(holder, ()))

    def free(self, holder: str) -> tuple[int, ...]:
        """Take back all blocks of `holder`; nothing when it holds none."""
        back = self._held.pop(holder, [])
        self._free.extend(reversed(back))
        return tuple(back)

    def check(self) -> None:
        """Assert that every block is free or held, exactly once; the engine calls it when idle."""
        held = [block for blocks in self._held.values() for block in blocks]
        assert sorted([*held, *self._free]) == list(range(1, self._count)), "a cache block is lost or held twice"
