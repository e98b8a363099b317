"""Which streams a step computes, by example and by running many steps of random streams."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.cluster.policy.batching import Running, StepPlan, Waiting, admit_streams
from polygraft.cluster.policy.entry import blocks_for, ever_fits
from polygraft.cluster.policy.fairness import Ledger

BLOCK = 4


def plan(
    waiting: tuple[Waiting, ...] = (),
    running: tuple[Running, ...] = (),
    *,
    free: int = 100,
    streams: int = 8,
    rows: int = 64,
) -> StepPlan:
    return admit_streams(
        waiting, running, ledger=Ledger(), free_blocks=free, block_size=BLOCK, max_streams=streams, rows=rows
    )


def decoding(name: str, *, held: int = 2, missing: int = 0) -> Running:
    return Running(name, 1, held, missing)


def test_new_streams_enter_in_the_order_they_came() -> None:
    found = plan((Waiting("a", 5, 5), Waiting("b", 3, 13)), (decoding("x"),))
    assert found == StepPlan((), ("a", "b"), (("x", 1), ("a", 5), ("b", 3)))


def test_decoding_comes_before_prefill_and_prefill_is_cut_into_chunks() -> None:
    found = plan((Waiting("a", 9, 9),), (Running("p", 30, 8, 0), decoding("x")), rows=20)
    assert found == StepPlan((), (), (("x", 1), ("p", 19)))
    assert plan((Waiting("a", 9, 9),), (decoding("x"),), rows=5) == StepPlan((), ("a",), (("x", 1), ("a", 4)))


def test_a_prompt_that_must_be_whole_is_never_cut_and_nobody_comes_after_one_that_is_too_long() -> None:
    found = plan((Waiting("a", 9, 9, min_chunk=7), Waiting("b", 3, 3)), (decoding("x"),), rows=5)
    assert found == StepPlan((), ("a",), (("x", 1), ("a", 7)))
    assert plan((Waiting("a", 9, 9, min_chunk=7),), rows=8).chunks == (("a", 8),)
    assert plan((), (Running("a", 9, 3, 0, min_chunk=7), Running("p", 30, 8, 0)), rows=4).chunks == (("a", 7),)
    assert plan((Waiting("a", 9, 9, min_chunk=7),), (decoding("x"), decoding("y")), rows=2).admitted == ()


def test_a_stream_enters_only_while_everyone_keeps_a_block() -> None:
    # 2 blocks for a, one for x and one for a itself
    assert plan((Waiting("a", 8, 8),), (decoding("x"),), free=4).admitted == ("a",)
    assert plan((Waiting("a", 8, 8),), (decoding("x"),), free=3).admitted == ()
    assert plan((Waiting("a", 8, 8),), (decoding("x", missing=1),), free=4).admitted == ()


def test_the_first_stream_that_does_not_fit_stops_the_queue() -> None:
    assert plan((Waiting("a", 99, 99), Waiting("b", 1, 1)), free=20).admitted == ()


def test_no_more_streams_than_allowed() -> None:
    assert plan(tuple(Waiting(name, 1, 1) for name in "abc"), (decoding("x"),), streams=3).admitted == ("a", "b")


def test_the_youngest_leave_when_blocks_run_out() -> None:
    streams = tuple(decoding(name, held=2, missing=1) for name in "abcd")
    found = plan((Waiting("w", 1, 1),), streams, free=0)
    assert found == StepPlan(("d", "c"), (), (("a", 1), ("b", 1)))


def test_while_rows_last_decoding_streams_get_one_each_and_the_others_wait() -> None:
    assert plan((), tuple(decoding(name) for name in "abc"), rows=2).chunks == (("a", 1), ("b", 1))
    assert plan((Waiting("w", 1, 1),), (decoding("a"),), rows=9).chunks == (("a", 1), ("w", 1))


def test_nobody_leaves_while_the_blocks_are_just_enough() -> None:
    streams = tuple(decoding(name, missing=1) for name in "abc")
    assert plan((), streams, free=3).evicted == ()
    assert plan((), streams, free=2).evicted == ("c",)


@dataclass
class Stream:
    name: str
    prompt: int
    wanted: int
    entire: bool = False
    computed: int = 0
    produced: int = 0
    held: int = 0

    @property
    def slots(self) -> int:
        return self.prompt + self.produced

    @property
    def left(self) -> int:
        return self.slots - self.computed

    @property
    def min_chunk(self) -> int:
        return self.prompt if self.entire and not self.computed else 1


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20), st.booleans()), min_size=1, max_size=10),
    st.integers(14, 30),
    st.integers(1, 6),
    st.integers(4, 40),
)
def test_all_streams_finish_and_no_block_is_overdrawn(
    wishes: list[tuple[int, int, bool]], blocks: int, max_streams: int, rows: int
) -> None:
    waiting = [Stream(f"{n}", *wish) for n, wish in enumerate(wishes)]
    assert all(ever_fits(one.prompt + one.wanted, blocks=blocks, block_size=BLOCK) for one in waiting)
    running: list[Stream] = []
    free, finished = blocks, 0
    for _ in range(2000):
        if not waiting and not running:
            break
        found = admit_streams(
            [Waiting(one.name, one.left, one.slots, one.min_chunk) for one in waiting],
            [
                Running(one.name, one.left, one.held, max(0, blocks_for(one.slots, BLOCK) - one.held), one.min_chunk)
                for one in running
            ],
            ledger=Ledger(),
            free_blocks=free,
            block_size=BLOCK,
            max_streams=max_streams,
            rows=rows,
        )
        assert found.chunks, "something moves in every step"
        for name in found.evicted:
            gone = running.pop()
            assert gone.name == name
            free, gone.held, gone.computed = free + gone.held, 0, 0
            waiting.insert(0, gone)
        for name in found.admitted:
            running.append(waiting.pop(0))
            assert running[-1].name == name
        assert len(running) <= max_streams
        for one in running:
            needed = max(0, blocks_for(one.slots, BLOCK) - one.held)
            free, one.held = free - needed, one.held + needed
        assert free >= 0
        used = 0
        for name, count in found.chunks:
            one = next(stream for stream in running if stream.name == name)
            assert used < rows and (used + count <= rows or count == one.min_chunk) and count >= one.min_chunk
            used += count
            one.computed += count
            if one.left == 0:
                one.produced += 1
                if one.produced == one.wanted:
                    free, finished = free + one.held, finished + 1
                    running.remove(one)
    assert finished == len(wishes) and free == blocks
