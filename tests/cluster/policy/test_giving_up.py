"""Which streams give up their blocks, in which order: where those that run cannot all grow, and for one that comes."""

from __future__ import annotations

from dataclasses import replace

from polygraft.cluster.policy.batching import Running
from polygraft.cluster.policy.fairness import Ledger
from tests.cluster.policy.test_fairness import ANN, BOB, chosen, of, wanting


def growing(*streams: Running) -> tuple[Running, ...]:
    """Streams that hold nothing yet, and miss a block each."""
    return tuple(replace(stream, held=0, missing=1) for stream in streams)


def test_the_tenant_with_most_streams_gives_up_its_last_though_another_came_later() -> None:
    assert chosen((), growing(*of(ANN, "a0", "a1", "a2"), *of(BOB, "b0")), Ledger(), free_blocks=3).evicted == ("a2",)
    heavy = Ledger(weights={ANN: 4.0})
    assert chosen((), growing(*of(ANN, "a0", "a1", "a2"), *of(BOB, "b0")), heavy, free_blocks=3).evicted == ("b0",)


def test_of_equal_shares_who_was_served_more_gives_up_else_who_came_last() -> None:
    (a0, a1), (b0, b1) = of(ANN, "a0", "a1"), of(BOB, "b0", "b1")
    streams = growing(a0, b0, b1, a1)
    assert chosen((), streams, Ledger(), free_blocks=3).evicted == ("a1",)
    assert chosen((), streams, Ledger(served={BOB: 1.0}), free_blocks=3).evicted == ("b1",)


def test_each_that_gave_up_counts_before_the_next_is_found() -> None:
    streams = growing(*of(ANN, "a0", "a1", "a2"), *of(BOB, "b0", "b1"))
    assert chosen((), streams, Ledger(), free_blocks=2).evicted == ("a2", "b1", "a1")
    assert chosen((), streams, Ledger(), free_blocks=0).evicted == ("a2", "b1", "a1", "b0", "a0")


def test_who_came_in_this_step_counts_beside_those_that_run() -> None:
    """The first of bob's takes the free place, the second that of ann's last, and the third would be one too many."""
    found = chosen(tuple(wanting(f"b{n}", BOB) for n in range(3)), of(ANN, "a0", "a1", "a2"), Ledger(), max_streams=4)
    assert (found.evicted, found.admitted) == (("a2",), ("b0", "b1"))


def test_one_that_makes_room_gives_back_the_block_that_it_has_just_been_given() -> None:
    """Three held 2 and get one each of 4; b needs one, and each stream one that it may grow into."""
    running = tuple(replace(stream, missing=1) for stream in of(ANN, "a0", "a1", "a2"))
    found = chosen((wanting("b", BOB),), running, Ledger(), max_streams=3, free_blocks=4)
    assert (found.evicted, found.admitted) == (("a2",), ("b",))
