"""Which blocks of the cache hold the keys and values of which tokens, for sequences that begin alike."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

_LOOKED_AT = 32  # newest blocks that are compared token by token, where none is the same


@dataclass(slots=True, eq=False)
class _Node:
    """A full block, below the one before it. An owner is a node, too, with the reserved block 0, and so is what is
    above all owners. `changes` of its children are counted; a node that is forgotten is `lost`."""

    key: Hashable
    block: int
    parent: _Node | None
    children: dict[Hashable, _Node] = field(default_factory=dict)
    changes: int = 0
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Match:
    """What of a sequence is in the cache: its first `slots` slots, in `blocks`, and `copied` of them at the beginning
    of `source`, which goes on otherwise."""

    slots: int = 0
    blocks: tuple[int, ...] = ()
    source: int = 0
    copied: int = 0
    _last: _Node | None = field(default=None, repr=False, compare=False)  # the node that was found last
    _seen: int = field(default=0, repr=False, compare=False)  # of its changes

    @property
    def holds(self) -> bool:
        """Whether it is what a search would find now."""
        return self._last is not None and not self._last.lost and self._last.changes == self._seen


NOTHING = Match()


class Prefixes:
    """A tree of full blocks for each owner, by the ids of their slots: nothing is found but by all tokens from the
    first on, compared as they are. Who holds a block holds those above it; the engine's thread owns the tree."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._top = _Node(None, 0, None)
        self._nodes: dict[int, _Node] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._nodes

    def match(self, owner: Hashable, ids: Sequence[int], before: Match = NOTHING) -> Match:
        """The longest known beginning of `ids`. `before` is what was found of them before: what is known of it still is
        not looked for again."""
        node, blocks = before._last, list(before.blocks)
        if node is None or node.lost or node is self._top:
            node, blocks = self._top.children.get(owner, self._top), []
        if node is self._top:
            return Match(_last=node, _seen=node.changes)
        parts = self._parts(ids, len(blocks))
        while (part := next(parts, ())) in node.children:
            node = node.children[part]
            blocks.append(node.block)
        newest = islice(reversed(node.children.values()), _LOOKED_AT)
        copied, source = max(((_common(one.key, part), one.block) for one in newest), default=(0, 0))
        slots = len(blocks) * self._block_size + copied
        return Match(slots, tuple(blocks), source if copied else 0, copied, node, node.changes)

    def add(self, owner: Hashable, ids: Sequence[int], blocks: Sequence[int]) -> tuple[int, ...]:
        """Note that full `blocks` hold `ids`. Returns the blocks that are known to: the first, of those computed
        twice."""
        node = self._top.children.get(owner) or self._below(self._top, owner, 0)
        known = []
        for part, block in zip(self._parts(ids), blocks, strict=True):
            if part not in node.children:
                assert block not in self._nodes
                self._nodes[block] = self._below(node, part, block)
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
            one.lost = True
            del self._nodes[one.block]
        return tuple(one.block for one in gone)

    def _below(self, parent: _Node, key: Hashable, block: int) -> _Node:
        """A new node, the newest of its parent's."""
        node = parent.children[key] = _Node(key, block, parent)
        parent.changes += 1
        return node

    def _unlink(self, node: _Node) -> None:
        """Take it off the tree, and the owner whose last block it was."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        parent.changes += 1
        if not parent.children and parent.parent is self._top:
            parent.lost = True
            self._unlink(parent)

    def _parts(self, ids: Sequence[int], first: int = 0) -> Iterator[tuple[int, ...]]:
        """The ids of each block from number `first` on; of the last one maybe fewer."""
        size = self._block_size
        return (tuple(ids[at : at + size]) for at in range(first * size, len(ids), size))


def _common(key: Hashable, part: Sequence[int]) -> int:
    """How many ids both begin with."""
    assert isinstance(key, tuple)
    return next((at for at, (one, other) in enumerate(zip(key, part, strict=False)) if one != other), len(part))
