"""Which blocks of the key-value cache are free and who holds the others; the tensors are the runtime's."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence

from polygraft.cluster.policy.entry import blocks_for
from polygraft.serving.prefixes import NOTHING, Match, Prefixes

BLOCK_SIZE = 16  # tokens; the runtime gathers contexts in multiples of it


class Blocks:
    """Blocks 1 to `count - 1`; block 0 is reserved, always zero, and stands for "no block" in page tables.

    Holders are request ids. A full block whose tokens are known is held by all whose sequences begin so; when nobody
    holds it any more it is free, and stays known until it is given out, after all others and the longest unused first.
    Not thread-safe: the engine thread owns it.
    """

    def __init__(self, *, count: int, block_size: int, bytes_per_block: int) -> None:
        if count < 2 or block_size < 1:
            raise ValueError(f"blocks: {count} of {block_size} tokens leave none to give; raise serve.kv_bytes")
        self.block_size = block_size
        self.bytes_per_block = bytes_per_block
        self._count = count
        self._free = list(range(count - 1, 0, -1))
        self._known_free: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._held: dict[str, list[int]] = {}
        self._holders: Counter[int] = Counter()  # of each block
        self._shared: set[int] = set()  # by more than one
        self._known: dict[str, int] = {}  # by holder: how many of its blocks' tokens were told
        self._prefixes = Prefixes(block_size)

    @property
    def total(self) -> int:
        return self._count - 1

    @property
    def free_blocks(self) -> int:
        return len(self._free) + len(self._known_free)

    @property
    def used_bytes(self) -> int:
        return (self.total - self.free_blocks) * self.bytes_per_block

    def missing(self, holder: str, slots: int) -> int:
        """Blocks `holder` still lacks to hold `slots` slots."""
        return max(0, blocks_for(slots, self.block_size) - len(self._held.get(holder, ())))

    def can_allocate(self, blocks: int) -> bool:
        return blocks <= self.free_blocks

    def allocate(self, holder: str, blocks: int) -> tuple[int, ...]:
        """Give `holder` that many more blocks and return the new ones; ask `can_allocate` first."""
        assert self.can_allocate(blocks), f"{blocks} blocks asked, {self.free_blocks} free"
        new = []
        for _ in range(blocks):
            if not self._free:
                self._forget(next(iter(self._known_free)))
            new.append(self._free.pop())
        self._hold(holder, new)
        return tuple(new)

    def table(self, holder: str) -> tuple[int, ...]:
        """The holder's blocks in the order of its tokens."""
        return tuple(self._held.get(holder, ()))

    def yields(self, holders: Iterable[str]) -> list[int]:
        """How many blocks are free again when each of `holders` leaves, the last of them first."""
        seen: set[int] = set()
        found = []
        for holder in holders:
            table = self._held.get(holder, [])
            shared = self._shared.intersection(table)
            found.append(len(table) - len(shared & seen))
            seen |= shared
        return found

    def match(self, owner: Hashable, ids: Sequence[int], before: Match = NOTHING) -> Match:
        """Blocks of the owner that hold the keys and values of the longest beginning of `ids`; `before` is what was
        found of them before."""
        return self._prefixes.match(owner, ids, before)

    def share(self, holder: str, blocks: Sequence[int]) -> None:
        """Let `holder`, which has none yet, have known blocks too."""
        assert holder not in self._held
        self._hold(holder, blocks)
        self._known[holder] = len(blocks)

    def known(self, holder: str) -> int:
        """How many of the holder's blocks were told the tokens of."""
        return self._known.get(holder, 0)

    def know(self, holder: str, owner: Hashable, ids: Sequence[int]) -> None:
        """The first blocks of `holder` are full, and hold `ids`. Where others had computed the same, it has theirs."""
        table = self._held[holder]
        known = self._prefixes.add(owner, ids, table[: len(ids) // self.block_size])
        for at, block in enumerate(known):
            if table[at] != block:
                self._let_go(table[at])
                table[at] = block
                self._take(block)
        self._known[holder] = len(known)

    def free(self, holder: str) -> tuple[int, ...]:
        """Take back all blocks of `holder`; nothing when it holds none."""
        back = self._held.pop(holder, [])
        self._known.pop(holder, None)
        for block in reversed(back):
            self._let_go(block)
        return tuple(back)

    def distrust(self, holder: str) -> None:
        """Let nobody find the holder's blocks, nor what was computed behind them."""
        for block in self._held.get(holder, ()):
            self._forget(block)

    def check(self) -> None:
        """Assert that every block is free, or held as often as counted; the engine calls it when idle."""
        held = Counter(block for blocks in self._held.values() for block in blocks)
        assert sorted([*held, *self._free, *self._known_free]) == list(range(1, self._count)), "a cache block is lost"
        assert held == self._holders, "a cache block is held by others than counted"
        assert self._shared == {block for block, count in held.items() if count > 1}, "a shared block is not counted so"
        assert all(block in self._prefixes for block in self._known_free), "a block is kept for nothing"
        assert not any(block in self._prefixes for block in self._free), "a block is known that may be given out"

    def _hold(self, holder: str, blocks: Sequence[int]) -> None:
        if blocks:
            self._held.setdefault(holder, []).extend(blocks)
        for block in blocks:
            self._take(block)

    def _take(self, block: int) -> None:
        self._known_free.pop(block, None)
        self._holders[block] += 1
        if self._holders[block] > 1:
            self._shared.add(block)

    def _let_go(self, block: int) -> None:
        self._holders[block] -= 1
        if self._holders[block] == 1:
            self._shared.remove(block)
        if self._holders[block]:
            return
        del self._holders[block]
        if block in self._prefixes:
            self._known_free[block] = None
        else:
            self._free.append(block)

    def _forget(self, block: int) -> None:
        for gone in self._prefixes.forget(block):
            if gone in self._known_free:
                del self._known_free[gone]
                self._free.append(gone)
