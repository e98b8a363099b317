"""When a stream enters a cache, and that the router and the engine say the same about it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polygraft.cluster.model import ReplicaId
from polygraft.cluster.policy.batching import Running, Waiting, admit_streams
from polygraft.cluster.policy.entry import blocks_for, ever_fits, may_enter
from polygraft.cluster.policy.fairness import Ledger
from polygraft.cluster.policy.routing import Refusal, RefusalReason, ReplicaView, RouteRequest, RouteView, route, starts

BLOCK = 16


def test_blocks_are_counted_whole() -> None:
    assert [blocks_for(slots, BLOCK) for slots in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]


def test_a_stream_enters_while_every_stream_keeps_a_block_to_grow_into() -> None:
    assert may_enter(2, running=3, free_blocks=6, max_streams=4)
    assert not may_enter(2, running=3, free_blocks=5, max_streams=4)
    assert not may_enter(2, running=4, free_blocks=99, max_streams=4)


def test_a_stream_that_fills_the_last_block_never_fits() -> None:
    assert ever_fits(16, blocks=2, block_size=BLOCK)
    assert not ever_fits(17, blocks=2, block_size=BLOCK)


@given(
    slots=st.integers(1, 200),
    running=st.integers(0, 6),
    free=st.integers(0, 24),
    held=st.integers(0, 24),
    max_streams=st.integers(1, 6),
    queued=st.integers(0, 1),
)
def test_the_router_calls_startable_what_the_engine_admits_in_its_next_step(
    slots: int, running: int, free: int, held: int, max_streams: int, queued: int
) -> None:
    total = free + held
    replica = ReplicaView(id=ReplicaId("r"), running=running, waiting=queued, blocks=total, free_blocks=free)
    view = RouteView(replicas=(replica,), max_streams=max_streams, block_size=BLOCK)
    answer = route(view, RouteRequest(graft=None, slots=slots))
    starting = starts(view, replica, blocks_for(slots, BLOCK))

    # Every running stream has the block for its next row, and the step has rows for all.
    older = tuple(Waiting(f"older {n}", 1, 10_000) for n in range(queued))
    others = tuple(Running(f"{n}", 1, 1, 0) for n in range(running))
    new = Waiting("new", slots, slots)
    assert starting is ("new" in admitted((*older, new), others, free=free, max_streams=max_streams))
    assert (answer == Refusal(RefusalReason.TOO_LONG)) is (not admitted((new,), (), free=total, max_streams=1))


def admitted(
    waiting: tuple[Waiting, ...], running: tuple[Running, ...], *, free: int, max_streams: int
) -> tuple[str, ...]:
    plan = admit_streams(
        waiting, running, ledger=Ledger(), free_blocks=free, block_size=BLOCK, max_streams=max_streams, rows=1000
    )
    return plan.admitted
