"""Which blocks of the cache hold the keys and values of which tokens, for sequences that begin alike."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

_LOOKED_AT = 32  # newest blocks that are compared token by token, where none is the same


@dataclass(frozen=True, slots=True)
class Match:
    """What of a sequence is in the cache: its first `slots` slots, in `blocks`, and `copied` of them at the beginning
    of `source`, which goes on otherwise."""

    slots: int = 0
    blocks: tuple[int, ...] = ()
    source: int = 0
    copied: int = 0


@dataclass(slots=True, eq=False)
class _Node:
    """A full block, below the one before it. An owner is a node, too, with the reserved block 0."""

    key: Hashable
    block: int
    parent: _Node | None
    children: dict[Hashable, _Node] = field(default_factory=dict)


class Prefixes:
    """A tree of full blocks for each owner, by the ids of their slots: nothing is found but by all tokens from the
    first on, compared as they are. Who holds a block holds those above it; the engine's thread owns the tree."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._top = _Node(None, 0, None)
        self._nodes: dict[int, _Node] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._nodes

    def match(self, owner: Hashable, ids: Sequence[int]) -> Match:
        """The longest known beginning of `ids`."""
        node = self._top.children.get(owner)
        blocks: list[int] = []
        parts = self._parts(ids)
        part: tuple[int, ...] = ()
        while node is not None and (part := next(parts, ())) in node.children:
            node = node.children[part]
            blocks.append(node.block)
        newest = () if node is None else islice(reversed(node.children.values()), _LOOKED_AT)
        copied, source = max(((_common(one.key, part), one.block) for one in newest), default=(0, 0))
        return Match(len(blocks) * self._block_size + copied, tuple(blocks), source if copied else 0, copied)

    def add(self, owner: Hashable, ids: Sequence[int], blocks: Sequence[int]) -> tuple[int, ...]:
        """Note that full `blocks` hold `ids`. Returns the blocks that are known to: the first, of those computed
        twice."""
        node = self._top.children.setdefault(owner, _Node(owner, 0, self._top))
        known = []
        for part, block in zip(self._parts(ids), blocks, strict=True):
            if part not in node.children:
                assert block not in self._nodes
                node.children[part] = self._nodes[block] = _Node(part, block, node)
            node = node.children[part]
            known.append(node.block)
        return tuple(known)

    def forget(self, block: int) -> tuple[int, ...]:
        """Forget the block and those below it, which nobody finds any more; returns all that were known."""
        node = self._nodes.get(block)
        if node is None:
            return ()
        self._unlink(node)
        gone = [node]
        for one in gone:  # grows while it is read
            gone += one.children.values()
            del self._nodes[one.block]
        return tuple(one.block for one in gone)

    def _unlink(self, node: _Node) -> None:
        """Take it off the tree, and the owner whose last block it was."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        if not parent.children and parent.parent is self._top:
            del self._top.children[parent.key]

    def _parts(self, ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
        return (tuple(ids[at : at + self._block_size]) for at in range(0, len(ids), self._block_size))


def _common(key: Hashable, part: Sequence[int]) -> int:
    """How many ids both begin with."""
    assert isinstance(key, tuple)
    return next((at for at, (one, other) in enumerate(zip(key, part, strict=False)) if one != other), len(part))
