"""The policy class that Ray Serve calls: whatever goes wrong, there are as many replicas as there were."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from dataclasses import dataclass
from threading import enumerate as threads

import pytest
from ray import cloudpickle
from ray.serve.config import AutoscalingPolicy

from polygraft.cluster.actors.scaler import Scaler
from polygraft.cluster.model import Device, DeviceId, Holding, Occupancy, Replica, ReplicaId
from polygraft.cluster.store.base import JSON

RULES = {"holds": 4, "least": 1, "most": 3, "calm_s": 1.0, "idle_s": None}


@dataclass
class Context:
    target_num_replicas: int


def scaler(rules: dict[str, float | None] = RULES) -> Scaler:
    """Over a store in which nobody says anything."""
    return Scaler(store_url="memory://", backbone="tiny", share=0.5, scaling=rules)


def device(name: str) -> Device:
    return Device(id=DeviceId(name), node="n", kind="cpu", index=0, cores=1, bytes=1000, speed=1.0)


def entry(ingress: str, streams: int, waiting: int = 0) -> dict[str, JSON]:
    return {"ingress": ingress, "streams": streams, "waiting": waiting}


def test_what_all_ingresses_say_counts_and_only_their_last_word() -> None:
    policy, now = scaler(), time.monotonic()
    policy.hear([entry("a", 1), entry("b", 2), entry("a", 3, waiting=1)], now)
    assert policy.target(1, now) == 2  # 6 streams
    policy.hear([entry("b", 7)], now)
    assert policy.target(2, now) == 3


def test_an_ingress_that_is_silent_wants_nothing() -> None:
    policy, now = scaler(), time.monotonic()
    policy.hear([entry("dies", 12)], now)
    policy.target(3, now)
    for later in range(1, 8):
        policy.hear([entry("lives", 3)], now + later)
        found = policy.target(3, now + later)
    assert found == 1


def test_replicas_stay_while_nothing_is_heard_and_for_a_calm_time_after() -> None:
    policy, now = scaler(), time.monotonic()
    assert policy(Context(3)) == (3, {})  # before the first word
    policy.hear([], now)
    policy.target(3, now)
    assert policy.target(3, now + 60) == 3  # the store has been away
    policy.hear([], now + 61)
    assert policy.target(3, now + 61) == 3
    policy.hear([], now + 62.5)
    assert policy.target(3, now + 62.5) == 1


def test_a_policy_that_raises_keeps_the_replicas(logged: list[logging.LogRecord]) -> None:
    policy = scaler({**RULES, "holds": 0})  # divides by it
    policy.hear([entry("a", 1)], time.monotonic())
    assert [policy(Context(2)) for _ in range(3)] == [(2, {})] * 3
    assert sum("keeps its 2 replicas" in line.getMessage() for line in logged) == 1


def test_without_a_most_there_are_as_many_as_find_room_on_the_devices() -> None:
    policy, now = scaler({**RULES, "most": None}), time.monotonic()
    full = Occupancy(device=device("full"), holders=(Holding("pack", 600),))
    own = Replica(id=ReplicaId("r"), backbone="tiny", devices=(), bytes=500, actor="r", opened_at=0.0)
    other = Replica(id=ReplicaId("x"), backbone="another", devices=(), bytes=500, actor="x", opened_at=0.0)
    half = Occupancy(device=device("half"), holders=(Holding("r", 500),))
    policy.hear([entry("a", 100)], now)
    policy.see([own, other], [full])
    assert policy.target(1, now) == 1  # its own, and no room beside the pack
    policy.see([own, other], [full, half, Occupancy(device=device("free"))])
    assert policy.target(1, now) == 4
    policy.see([], [])
    assert policy.target(4, now) == 1  # nothing is known of any device: it has what it must have


def test_where_replicas_are_of_a_size_only_devices_that_have_it_left_count() -> None:
    policy = Scaler(store_url="memory://", backbone="tiny", share=0.5, scaling={**RULES, "most": None}, bytes_=300)
    now = time.monotonic()
    policy.hear([entry("a", 100)], now)
    policy.see([], [Occupancy(device=device("free")), Occupancy(device=device("b"), holders=(Holding("p", 701),))])
    assert policy.target(1, now) == 3


@pytest.mark.parametrize("wrong", [{}, {"ingress": "a"}, {"ingress": "a", "streams": "many", "waiting": 0}])
def test_an_entry_that_is_no_demand_is_left_out(wrong: dict[str, JSON]) -> None:
    policy, now = scaler(), time.monotonic()
    policy.hear([wrong, entry("b", 5)], now)
    assert policy.target(1, now) == 2


def test_serve_can_carry_it_to_its_controller() -> None:
    """By value, as it does, without whatever else its module has imported."""
    kwargs = {"store_url": "memory://", "backbone": "tiny", "share": 0.5, "scaling": RULES}
    carried = AutoscalingPolicy(policy_function="polygraft.cluster.actors.scaler:Scaler", policy_kwargs=kwargs)
    policy = cloudpickle.loads(carried.get_serialized_policy_def())(**carried.policy_kwargs)  # type: ignore[arg-type]
    assert policy(Context(2)) == (2, {})


def test_a_policy_that_serve_has_dropped_leaves_no_thread() -> None:
    before = {thread.ident for thread in threads()}
    gone = weakref.ref(scaler())
    gc.collect()
    assert gone() is None
    until = time.monotonic() + 10
    while any(thread.name == "scaler" and thread.ident not in before for thread in threads()):
        assert time.monotonic() < until
        time.sleep(0.05)
