"""Cache blocks: given out once, taken back whole, never block 0."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygraft.serving.blocks import Blocks

HOLDERS = st.sampled_from(["a", "b", "c", "d"])
ACTIONS = st.lists(st.tuples(HOLDERS, st.integers(0, 40) | st.none()), max_size=60)


@given(count=st.integers(2, 24), actions=ACTIONS)
def test_blocks_never_overlap_and_never_leak(count: int, actions: list[tuple[str, int | None]]) -> None:
    blocks = Blocks(count=count, block_size=4, bytes_per_block=100)
    tables: dict[str, tuple[int, ...]] = {}
    for holder, tokens in actions:
        if tokens is None:
            assert blocks.free(holder) == tables.pop(holder, ())
        elif blocks.can_allocate(missing := blocks.missing(holder, tokens)):
            new = blocks.allocate(holder, missing)
            tables[holder] = (*tables.get(holder, ()), *new)
            assert blocks.table(holder) == tables[holder]  # earlier tokens stay where they are
            assert blocks.missing(holder, tokens) == 0
        held = [block for table in tables.values() for block in table]
        assert len(held) == len(set(held)) and 0 not in held
        assert len(held) + blocks.free_blocks == blocks.total == count - 1
        assert blocks.used_bytes == 100 * len(held)
        blocks.check()
    for holder in list(tables):
        blocks.free(holder)
    assert blocks.free_blocks == blocks.total


def test_a_query_changes_nothing() -> None:
    blocks = Blocks(count=4, block_size=16, bytes_per_block=1)
    assert blocks.can_allocate(3) and not blocks.can_allocate(4)
    assert blocks.missing("a", 17) == 2
    assert blocks.free_blocks == 3 and blocks.table("a") == ()


def test_a_cache_without_a_block_to_give_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_bytes"):
        Blocks(count=1, block_size=16, bytes_per_block=1)
