"""What ingresses and the store tell each other of replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest

from polygraft.cluster.model import DeviceId, GraftId, Replica, ReplicaId, TenantId
from polygraft.cluster.policy.scaling import Demand
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import JSON, Append, StoreUnavailable, Write
from polygraft.cluster.store.memory import MemoryStore
from polygraft.serving.fleet import StoreFleet
from polygraft.serving.gateway import Link

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Named:
    """A link that is nothing but its replica."""

    def __init__(self, replica: Replica) -> None:
        self.actor = replica.actor


class Told:
    """In a gateway's place."""

    name = "i"

    def __init__(self) -> None:
        self.links: Mapping[ReplicaId, Link] = {}
        self.demand = Demand()
        self.used: set[tuple[TenantId, GraftId]] = set()

    def follow(self, links: Mapping[ReplicaId, Link]) -> None:
        self.links = dict(links)


def replica(id: str, backbone: str = "tiny") -> Replica:
    return Replica(
        id=ReplicaId(id), backbone=backbone, devices=(DeviceId("n/cpu0"),), bytes=1, actor=f"actor-{id}", opened_at=0.0
    )


def opened(store: MemoryStore, one: Replica) -> None:
    change = Append(keys.replica_changes(one.backbone), {"replica": one.id})
    store.commit([Write(keys.replica(one.id), one, 0)], appends=[change])


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.01)


def said(store: MemoryStore) -> list[Mapping[str, JSON]]:
    return [entry for _, entry in store.read(keys.demand("tiny"))]


async def test_a_gateway_has_the_open_replicas_of_its_backbone() -> None:
    store, told = MemoryStore(), Told()
    opened(store, replica("a"))
    opened(store, replica("x", "another"))
    work = asyncio.create_task(StoreFleet(store, "tiny", connect=Named).keep(told))  # type: ignore[arg-type]
    await until(lambda: set(told.links) == {"a"})
    first = told.links[ReplicaId("a")]
    opened(store, replica("b"))
    await until(lambda: set(told.links) == {"a", "b"})
    assert told.links[ReplicaId("a")] is first
    store.commit(
        [Write(keys.replica(ReplicaId("a")), None, None)],
        appends=[Append(keys.replica_changes("tiny"), {"replica": "a"})],
    )
    await until(lambda: set(told.links) == {"b"})
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


async def test_what_is_wanted_is_said_when_it_changes_and_again_while_it_is_something() -> None:
    store, told = MemoryStore(), Told()
    work = asyncio.create_task(StoreFleet(store, "tiny", connect=Named).keep(told))  # type: ignore[arg-type]
    await asyncio.sleep(0.4)
    assert said(store) == []
    told.demand = Demand(2, 1)
    await until(lambda: len(said(store)) == 2)  # nothing else is
    told.demand, told.used = Demand(1, 0), {(TenantId("ann"), GraftId("g"))}
    await until(lambda: len(said(store)) == 3)
    told.demand, told.used = Demand(), set()
    await until(lambda: len(said(store)) == 4)
    await asyncio.sleep(1.2)
    entry = {"ingress": "i", "streams": 2, "waiting": 1, "grafts": []}
    used = {"ingress": "i", "streams": 1, "waiting": 0, "grafts": [["ann", "g"]]}
    assert said(store) == [entry, entry, used, {"ingress": "i", "streams": 0, "waiting": 0, "grafts": []}]
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


async def test_while_the_store_is_away_the_replicas_are_those_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    store, told = MemoryStore(), Told()
    opened(store, replica("a"))
    monkeypatch.setattr("polygraft.serving.fleet._LOOK_S", 0.05)
    work = asyncio.create_task(StoreFleet(store, "tiny", connect=Named).keep(told))  # type: ignore[arg-type]
    await until(lambda: set(told.links) == {"a"})

    def away(*_: object, **__: object) -> None:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "scan", away)
        patch.setattr(store, "append", away)
        told.demand = Demand(1)
        await asyncio.sleep(0.5)
        assert set(told.links) == {"a"} and not work.done()
    await until(lambda: len(said(store)) > 0)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
