"""Blocks of the cache that several sequences hold: what is in them is always their own, and none is lost."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.serving.blocks import Blocks
from polygraft.serving.prefixes import NOTHING, Match, Prefixes

SIZE = 2
OWNERS = ("a", "b")
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["enter", "enter", "compute", "compute", "know", "leave", "fail"]), st.integers(0, 99)),
    max_size=80,
)
PROMPTS = st.lists(st.tuples(st.sampled_from(OWNERS), st.lists(st.integers(0, 1), min_size=1, max_size=9)), min_size=1)
Slot = tuple[str, tuple[int, ...]]  # an owner, and all tokens up to this one


@dataclass
class Cache:
    """Streams that share blocks, and what stands in every slot."""

    blocks: Blocks
    slots: dict[int, dict[int, Slot]] = field(default_factory=dict)
    streams: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    matches: dict[tuple[str, tuple[int, ...]], Match] = field(default_factory=dict)
    entered: int = 0

    def enter(self, owner: str, ids: list[int]) -> None:
        """As the engine does it: share, be given the rest, copy what goes on otherwise; never all of its tokens."""
        before = self.blocks.match(owner, ids[:-1])
        if not self.blocks.can_allocate(-(-len(ids) // SIZE)):
            return
        self.entered += 1
        name = f"{self.entered}"
        self.blocks.share(name, before.blocks)
        for block in self.blocks.allocate(name, self.blocks.missing(name, len(ids))):
            self.slots[block] = {}
        found, table = self.blocks.match(owner, ids[:-1]), self.blocks.table(name)
        assert found.blocks == before.blocks == table[: len(found.blocks)] and found.slots < len(ids)
        for at in range(found.copied):
            self.slots[table[len(found.blocks)]][at] = self.slots[found.source][at]
        self.streams[name], self.computed[name] = (owner, ids), found.slots

    def compute(self, name: str) -> None:
        owner, ids = self.streams[name]
        if (at := self.computed[name]) < len(ids):
            block = self.blocks.table(name)[at // SIZE]
            assert [block in self.blocks.table(other) for other in self.streams].count(True) == 1, (
                "written while shared"
            )
            assert at % SIZE not in self.slots[block], "written twice"
            self.slots[block][at % SIZE] = owner, tuple(ids[: at + 1])
            self.computed[name] += 1

    def know(self, name: str) -> None:
        owner, ids = self.streams[name]
        full = self.computed[name] // SIZE
        if full > self.blocks.known(name):
            self.blocks.know(name, owner, ids[: full * SIZE])
            assert self.blocks.known(name) == full

    def leave(self, name: str) -> None:
        self.blocks.free(name)
        del self.streams[name], self.computed[name]

    def check(self) -> None:
        self.blocks.check()
        for name, (owner, ids) in self.streams.items():
            table = self.blocks.table(name)
            for at in range(self.computed[name]):
                assert self.slots[table[at // SIZE]][at % SIZE] == (owner, tuple(ids[: at + 1]))
        held = {block for name in self.streams for block in self.blocks.table(name)}
        assert len(held) + self.blocks.free_blocks == self.blocks.total and 0 not in held

    def check_kept(self, owner: str, ids: list[int]) -> None:
        """What is found beginning with what was found before is what is found anew, and says whether it still is."""
        before, anew = self.matches.get((owner, tuple(ids)), NOTHING), self.blocks.match(owner, ids)
        assert before == anew or not before.holds
        after = self.matches[owner, tuple(ids)] = self.blocks.match(owner, ids, before)
        assert after == anew and after.holds

    def check_yields(self, order: list[str]) -> None:
        """What the policy is told that a stream holds is what comes free when it leaves, the last one first."""
        left = deepcopy(self.blocks)
        for name, said in reversed([*zip(order, self.blocks.yields(order), strict=True)]):
            before = left.free_blocks
            left.free(name)
            assert left.free_blocks - before == said
        assert left.free_blocks == left.total


@settings(max_examples=150, deadline=None)
@given(count=st.integers(3, 16), prompts=PROMPTS, actions=ACTIONS)
def test_a_stream_finds_its_own_keys_and_values_in_its_blocks_whoever_shares_them(
    count: int, prompts: list[tuple[str, list[int]]], actions: list[tuple[str, int]]
) -> None:
    cache = Cache(Blocks(count=count, block_size=SIZE, bytes_per_block=1))
    for action, number in actions:
        if action == "enter":
            cache.enter(*prompts[number % len(prompts)])
        elif cache.streams:
            name = sorted(cache.streams)[number % len(cache.streams)]
            if action == "fail":
                cache.blocks.distrust(name)
                cache.leave(name)
            else:
                getattr(cache, action)(name)
        cache.check()
        cache.check_yields(sorted(cache.streams))
        cache.check_kept(*prompts[number % len(prompts)])
    for name in list(cache.streams):
        cache.leave(name)
    cache.check()
    everything = cache.blocks.allocate("new", cache.blocks.free_blocks)
    assert sorted(everything) == list(range(1, count))
    assert all(cache.blocks.match(*prompt) == Match() for prompt in prompts)


@pytest.fixture
def known() -> Prefixes:
    found = Prefixes(SIZE)
    assert found.add("a", [1, 2, 3, 4, 5, 6], [7, 8, 9]) == (7, 8, 9)
    return found


def test_the_longest_known_beginning_is_found_to_the_token(known: Prefixes) -> None:
    assert known.match("a", [1, 2, 3, 4, 5, 6, 7]) == Match(6, (7, 8, 9))
    assert known.match("a", [1, 2, 3, 4, 5]) == Match(5, (7, 8), source=9, copied=1)
    assert known.match("a", [1, 2, 3, 9]) == Match(3, (7,), source=8, copied=1)
    assert known.match("a", [1]) == Match(1, (), source=7, copied=1)
    assert known.match("a", [2, 2, 3, 4]) == known.match("a", []) == known.match("b", [1, 2]) == Match()


def test_what_was_computed_twice_is_known_once(known: Prefixes) -> None:
    assert known.add("a", [1, 2, 3, 4, 9, 9], [4, 5, 6]) == (7, 8, 6)
    assert known.add("b", [1, 2], [5]) == (5,)
    assert 4 not in known and 6 in known


def test_what_stands_behind_a_forgotten_block_is_forgotten_with_it(known: Prefixes) -> None:
    assert known.forget(8) == (8, 9) and known.forget(8) == ()
    assert known.match("a", [1, 2, 3, 4, 5, 6]) == Match(2, (7,))
    assert known.forget(7) == (7,) and not known._top.children


def test_of_blocks_that_nobody_holds_the_unknown_ones_go_first_and_then_the_longest_unused() -> None:
    blocks = Blocks(count=7, block_size=SIZE, bytes_per_block=1)
    for name, ids in (("x", [1, 2, 3, 4]), ("y", [5, 6, 7, 8])):
        blocks.allocate(name, 2)
        blocks.know(name, "a", ids)
    blocks.free("x")
    blocks.free("y")
    assert blocks.free_blocks == 6
    blocks.allocate("z", 3)  # the two that were never used, and the end of x's
    assert blocks.match("a", [1, 2, 3, 4]).slots == 2 and blocks.match("a", [5, 6, 7, 8]).slots == 4
    blocks.allocate("z", 1)
    assert blocks.match("a", [1, 2, 3, 4]).slots == 0 and blocks.match("a", [5, 6, 7, 8]).slots == 4
