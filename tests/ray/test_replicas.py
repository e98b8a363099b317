"""Ray Serve changes the number of replicas while streams run, by our policy, and no stream is cut."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ray import cloudpickle, serve

from polygraft.cluster.actors.applications import ENGINE
from polygraft.cluster.model import Backbone, Replica
from polygraft.cluster.settings import ServeSettings, Settings
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.grafts.runtime.backbone import Backbone as Loaded
from polygraft.grafts.runtime.pretrained import fingerprint
from polygraft.serving.app import engine_app
from polygraft.serving.fleet import StoreFleet
from polygraft.serving.gateway import Gateway
from polygraft.serving.remote import ActorLink
from polygraft.serving.request import GenerationRequest
from tests.ray import raising
from tests.ray.local import local_ray, write_devices
from tests.serving.engines import request
from tests.serving.replicas import fleet, said
from tests.tiny import tiny_llama

cloudpickle.register_pickle_by_value(raising)  # Ray's workers cannot import the tests
pytestmark = [pytest.mark.timeout(280)]
SERVE = ServeSettings(
    max_streams=4, max_context=1200, kv_bytes=8 << 20, max_rows=64, max_replicas=3, calm_s=2.0, drain_s=20.0
)
ZERO = SERVE.model_copy(update={"idle_s": 2.0})
FLOOR_S = 0.05


@dataclass(frozen=True)
class Place:
    """A Ray with a store, and the folder of a tiny backbone."""

    folder: Path
    data: Path
    store_url: str
    store: Store

    def backbone(self, name: str) -> Backbone:
        return Backbone(
            name=name,
            folder=str(self.folder),
            dtype="fp32",
            quantise=None,
            fingerprint=fingerprint(self.folder, None),
            context_length=512,
            added_at=0.0,
            asked_at=1.0,
        )

    def deploy(self, name: str, settings: ServeSettings, **options: str) -> None:
        given = Settings(home=self.data, data=self.data, store_url=self.store_url, serve=settings, step_floor_s=FLOOR_S)
        app = engine_app(given, self.backbone(name), **options)
        serve.run(app, name=f"backbone-{name}", route_prefix=None)

    def replicas(self, name: str) -> list[Replica]:
        return [one.value for one in self.store.scan(keys.REPLICAS) if one.value.backbone == name]

    def states(self, name: str) -> dict[str, int]:
        """What Serve says of them."""
        found = serve.status().applications[f"backbone-{name}"].deployments[ENGINE]
        return {str(state): count for state, count in found.replica_states.items() if count}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("place")
    folder = tiny_llama(home / "tiny")
    with EmbeddedServer(home / "store") as server, local_ray({}, devices=4):
        store = connect(server.url)
        write_devices(store, 4)
        serve.start(proxy_location="Disabled")
        try:
            yield Place(folder, home / "data", server.url, store)
        finally:
            serve.shutdown()
            store.close()


@asynccontextmanager
async def ingress(place: Place, name: str, settings: ServeSettings, who: str = "one") -> AsyncIterator[Gateway]:
    known = StoreFleet(place.store, name, connect=ActorLink)
    gateway = Gateway({}, ingress=who, settings=settings, ready_s=120.0, fleet=known)
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.close()


async def until(holds: Callable[[], bool], seconds: float = 200.0) -> float:
    """The time it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, "it did not come to pass"
        await asyncio.sleep(0.05)
    return time.monotonic() - began


def wanted(id: str, tokens: int) -> GenerationRequest:
    sampled = {"temperature": 1.0, "seed": len(id)} if tokens % 2 else {}
    return request(id, (5, 6, *map(ord, id)), tokens, **sampled)


def test_replicas_come_and_go_with_the_streams_and_cut_none(place: Place) -> None:
    requests = [wanted(f"long{n}", 1100 + n) for n in range(3)] + [wanted(f"short{n}", 150 + n) for n in range(7)]

    async def undisturbed() -> list[list[int]]:
        loaded = Loaded.load(place.folder, torch.float32)
        roomy = SERVE.model_copy(update={"max_streams": 10})
        async with fleet(loaded, place.data, roomy) as alone:
            alone.add()
            return list(await asyncio.gather(*(said(alone.gateway, one) for one in requests)))

    async def disturbed() -> list[list[int]]:
        spoken: list[list[int]] = [[] for _ in requests]
        async with ingress(place, "tiny", SERVE) as gateway, ingress(place, "broken", SERVE, "two") as beside:
            others = [asyncio.create_task(said(beside, wanted(f"x{n}", 400))) for n in range(6)]
            work = [asyncio.create_task(said(gateway, one, into)) for one, into in zip(requests, spoken, strict=True)]
            await until(lambda: place.states("tiny") == {"RUNNING": 3} and len(place.replicas("tiny")) == 3)
            assert place.states("broken") == {"RUNNING": 1}  # whose policy raises, in the same rounds
            await asyncio.gather(*work[3:])
            await until(lambda: place.states("tiny").get("RUNNING") == 1)
            last_s = await until(lambda: place.states("tiny") == {"RUNNING": 1} and len(place.replicas("tiny")) == 1)
            assert not any(task.done() for task in work[:3]), "no stream was running"
            print(f"from one running replica to one replica: {last_s:.2f} s")
            found = list(await asyncio.gather(*work))
            await asyncio.gather(*others)
            assert all(stream.deaths == 0 for stream in gateway._streams.values())
            return found

    place.deploy("tiny", SERVE)
    place.deploy("broken", SERVE, scaler="tests.ray.raising:Raising")
    assert asyncio.run(disturbed()) == asyncio.run(undisturbed())
    assert len(place.replicas("broken")) == 1
    for name in ("tiny", "broken"):
        serve.delete(f"backbone-{name}")
        assert place.replicas(name) == []


def test_a_backbone_without_replicas_gets_one_for_the_first_request_even_if_its_ingress_dies(place: Place) -> None:
    async def asked() -> None:
        async with ingress(place, "zero", ZERO, "lives") as gateway:
            async with ingress(place, "zero", ZERO, "dies") as other:
                lost = asyncio.create_task(said(other, wanted("lost", 5)))
                await asyncio.sleep(1.0)  # it has said what it wants
                assert not lost.done()
            lost.cancel()
            await until(lambda: len(place.replicas("zero")) == 1)
            assert len(await said(gateway, wanted("served", 20))) == 20
            await until(lambda: place.states("zero") == {} and place.replicas("zero") == [])
            assert len(await said(gateway, wanted("again", 20))) == 20

    place.deploy("zero", ZERO)
    assert place.states("zero") == {}
    asyncio.run(asked())
    serve.delete("backbone-zero")
