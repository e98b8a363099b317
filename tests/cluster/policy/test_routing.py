"""Which replica a request goes to."""

from __future__ import annotations

import pytest

from polygraft.cluster.model import GraftId, ReplicaId
from polygraft.cluster.policy.routing import (
    Refusal,
    RefusalReason,
    ReplicaView,
    RouteRequest,
    RouteView,
    route,
    starting,
)

G = GraftId("g")


def replica(
    name: str,
    running: int = 0,
    *,
    free: int = 90,
    waiting: int = 0,
    blocks: int = 100,
    resident: tuple[GraftId, ...] = (),
) -> ReplicaView:
    return ReplicaView(
        id=ReplicaId(name), running=running, waiting=waiting, blocks=blocks, free_blocks=free, resident=resident
    )


def view(*replicas: ReplicaView) -> RouteView:
    return RouteView(replicas=replicas, max_streams=4, block_size=16)


def chosen(*replicas: ReplicaView, slots: int = 16, tried: tuple[str, ...] = ()) -> str | RefusalReason:
    answer = route(view(*replicas), RouteRequest(graft=G, slots=slots, tried=[ReplicaId(one) for one in tried]))
    return answer.reason if isinstance(answer, Refusal) else answer


def test_the_busiest_replica_that_can_start_it_takes_it() -> None:
    assert chosen(replica("a", 1), replica("b", 3), replica("c", 2)) == "b"
    assert chosen(replica("a", 1), replica("b", 4), replica("c", 2)) == "c"  # b has all its streams


def test_every_running_stream_must_keep_a_block() -> None:
    assert chosen(replica("a", 1), replica("b", 3, free=5)) == "b"  # 1 block + 3 streams + itself
    assert chosen(replica("a", 1), replica("b", 3, free=4)) == "a"
    assert chosen(replica("a", 1), replica("b", 3, free=5), slots=17) == "a"


def test_equally_busy_replicas_differ_by_residency_then_by_free_blocks() -> None:
    assert chosen(replica("a", 1, resident=(G,)), replica("b", 1), replica("c", 1, free=50)) == "a"
    assert chosen(replica("a", 1), replica("b", 1), replica("c", 1, free=50)) == "c"
    assert chosen(replica("a", 1), replica("b", 1)) == "b"


def test_where_none_can_start_it_the_shortest_queue_takes_it() -> None:
    assert chosen(replica("a", 4, waiting=1), replica("b", 4), replica("c", 4, waiting=1)) == "b"
    assert chosen(replica("a", 1, waiting=1), replica("b", 4)) == "b"  # nobody overtakes a's queue
    assert chosen(replica("a", 4), replica("b", 4, resident=(G,))) == "b"
    assert chosen(replica("a", 4, waiting=10**6)) == "a"  # whether its tenant may wait, the replica says


@pytest.mark.parametrize(
    ("replicas", "slots", "tried", "reason"),
    [
        ((), 16, (), RefusalReason.NO_REPLICA),
        ((replica("a"),), 16, ("a",), RefusalReason.ALL_FULL),
        ((replica("a", 4, waiting=2), replica("b", 1, waiting=2)), 16, ("a", "b"), RefusalReason.ALL_FULL),
        ((replica("a", blocks=10, free=10),), 161, (), RefusalReason.TOO_LONG),
    ],
)
def test_a_refusal_says_why(
    replicas: tuple[ReplicaView, ...], slots: int, tried: tuple[str, ...], reason: RefusalReason
) -> None:
    assert chosen(*replicas, slots=slots, tried=tried) == reason


def test_a_replica_that_turned_it_down_is_not_asked_again() -> None:
    assert chosen(replica("a", 1), replica("b", 3), tried=("b",)) == "a"


def test_a_stream_that_comes_from_another_replica_goes_before_all_that_wait() -> None:
    busy, full = replica("a", 2, waiting=3), replica("b", 4)
    new, resumed = (RouteRequest(graft=G, slots=16, resumed=resumed) for resumed in (False, True))
    assert starting(view(busy, full), new) is None and route(view(busy, full), new) == "b"
    assert starting(view(busy, full), resumed) == "a" == route(view(busy, full), resumed)
    assert starting(view(full), resumed) is None and starting(view(), resumed) is None


def test_a_replica_that_can_never_hold_it_is_not_asked_however_short_its_queue_is() -> None:
    assert chosen(replica("a", 4, blocks=10), replica("b", 4, waiting=5), slots=161) == "b"


def test_of_equal_queues_the_one_that_holds_the_graft_then_the_first_by_name() -> None:
    assert chosen(replica("b", 4, waiting=1), replica("a", 4, waiting=1)) == "a"
    assert chosen(replica("a", 4, waiting=1), replica("b", 4, waiting=1, resident=(G,))) == "b"
