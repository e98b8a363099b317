"""Replicas of one backbone in this process that come and go under a gateway, and what became of each request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from polygraft.cluster.model import ReplicaId
from polygraft.cluster.settings import ServeSettings
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving.engine import Engine
from polygraft.serving.gateway import Gateway
from polygraft.serving.local import LocalLink
from polygraft.serving.messages import Draining, QueueFull
from polygraft.serving.request import GenerationRequest


class Recording(LocalLink):
    """Keeps what it was asked for and took."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.engine = engine
        self.taken: list[GenerationRequest] = []

    async def submit(self, request: GenerationRequest) -> QueueFull | Draining | None:
        answer = await super().submit(request)
        if answer is None:
            self.taken.append(request)
        return answer


class Fleet:
    """`add` and `drain` change the replicas that `gateway` sees."""

    def __init__(
        self, backbone: Backbone, data: Path, settings: ServeSettings, *, step_floor_s: float, ready_s: float
    ) -> None:
        self._backbone, self._data, self._settings, self._floor_s = backbone, data, settings, step_floor_s
        self.links: dict[ReplicaId, Recording] = {}
        self.gone: list[Recording] = []
        self.gateway = Gateway({}, ingress="i", settings=settings, ready_s=ready_s)

    def add(self) -> ReplicaId:
        id = ReplicaId(f"r{len(self.links) + len(self.gone)}")
        engine = Engine(self._backbone, self._settings, replica=id, data=self._data, step_floor_s=self._floor_s)
        engine.start()
        self.links[id] = Recording(engine)
        self.gateway.follow(self.links)
        return id

    async def drain(self, id: ReplicaId, patience_s: float = 60.0) -> None:
        """As Serve does it: the replica hands on what it has, then it is gone."""
        await self.links[id].drain(patience_s)
        self._drop(id)

    def kill(self, id: ReplicaId) -> None:
        """It ends with whatever it has."""
        self._drop(id)

    def _drop(self, id: ReplicaId) -> None:
        self.gone.append(self.links.pop(id))
        self.gateway.follow(self.links)
        self.gone[-1].engine.stop()

    def stop(self) -> None:
        for link in self.links.values():
            link.engine.stop()


@asynccontextmanager
async def fleet(
    backbone: Backbone, data: Path, settings: ServeSettings, *, step_floor_s: float = 0.0, ready_s: float = 60.0
) -> AsyncIterator[Fleet]:
    made = Fleet(backbone, data, settings, step_floor_s=step_floor_s, ready_s=ready_s)
    await made.gateway.start()
    try:
        yield made
    finally:
        await made.gateway.close()
        made.stop()


async def said(gateway: Gateway, wanted: GenerationRequest, into: list[int] | None = None) -> list[int]:
    """The tokens of a request that ends as it should, without gap or repetition; they go to `into` as they come."""
    tokens: list[int] = [] if into is None else into
    async with aclosing(gateway.generate(wanted)) as stream:
        async for one in stream:
            assert one.index == len(tokens) and one.token is not None
            tokens.append(one.token)
            last = one
    assert last.finish_reason == "length" and len(tokens) == wanted.max_tokens
    return tokens
