"""The gateway over real engines whose connections break: a stream goes on with the tokens it would have had."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polygraft.cluster.model import GraftId, ReplicaId
from polygraft.cluster.settings import ServeSettings
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving.engine import Engine
from polygraft.serving.gateway import Busy, Gateway, TooLong, Unavailable
from polygraft.serving.local import LocalLink
from polygraft.serving.messages import StepMessage
from polygraft.serving.request import GenerationRequest
from tests.serving.engines import request
from tests.tiny import tiny_llama

pytestmark = pytest.mark.anyio
SETTINGS = ServeSettings(max_streams=2, max_queued=1, max_context=128, kv_bytes=1 << 20, max_rows=64)
SAMPLED = replace(request("a", (5, 6, 7), 30), temperature=1.2, seed=3)


class Breaking(LocalLink):
    """Breaks after `tokens` tokens, `times` times, each time with the token after that already computed."""

    def __init__(self, engine: Engine, tokens: int, times: int = 1) -> None:
        super().__init__(engine)
        self._tokens, self._times = tokens, times

    async def messages(self, ingress: str) -> AsyncGenerator[StepMessage, None]:
        passed = 0
        async with aclosing(super().messages(ingress)) as messages:
            async for message in messages:
                if self._times and passed + len(message.tokens) > self._tokens:
                    self._times -= 1
                    yield StepMessage(message.tokens[: self._tokens - passed], message.load)
                    raise ConnectionError("cut")
                passed += len(message.tokens)
                yield message


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32)


@pytest.fixture
def engines(backbone: Backbone, tmp_path: Path) -> Iterator[list[Engine]]:
    made = [Engine(backbone, SETTINGS, replica=ReplicaId(f"r{i}"), data=tmp_path) for i in range(2)]
    for engine in made:
        engine.start()
    yield made
    for engine in made:
        engine.stop()


async def said(gateway: Gateway, wanted: GenerationRequest = SAMPLED) -> list[int]:
    async with aclosing(gateway.generate(wanted)) as stream:
        found = [tokens async for tokens in stream]
    assert [tokens.index for tokens in found] == list(range(len(found)))  # no gap, no duplicate
    assert [tokens.finish_reason for tokens in found] == [None] * (len(found) - 1) + ["length"]
    return [tokens.token for tokens in found if tokens.token is not None]


async def over(links: dict[str, LocalLink], wanted: GenerationRequest = SAMPLED) -> list[int]:
    gateway = Gateway({ReplicaId(name): link for name, link in links.items()}, ingress="i", settings=SETTINGS)
    await gateway.start()
    try:
        return await said(gateway, wanted)
    finally:
        await gateway.close()


@pytest.mark.parametrize("after", [0, 1, 13])
async def test_a_broken_stream_goes_on_at_another_replica(engines: list[Engine], after: int) -> None:
    whole = await over({"r0": LocalLink(engines[0])})
    # The router fills the replica whose id is greater first, when both are idle.
    assert await over({"r0": LocalLink(engines[0]), "r1": Breaking(engines[1], after)}) == whole


async def test_a_broken_stream_goes_on_at_the_same_replica_once_it_is_back(engines: list[Engine]) -> None:
    assert await over({"r0": Breaking(engines[0], 7)}) == await over({"r1": LocalLink(engines[1])})
    for _ in range(100):
        if engines[0].load.free_blocks == engines[0].load.blocks:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the first attempt still holds its blocks")


async def test_replicas_that_the_fleet_tells_of_take_requests(engines: list[Engine]) -> None:
    class Told:
        async def keep(self, gateway: Gateway) -> None:
            gateway.follow({ReplicaId("r0"): LocalLink(engines[0])})

    gateway = Gateway({}, ingress="i", settings=SETTINGS, fleet=Told())
    await gateway.start()
    assert await said(gateway) == await over({"r1": LocalLink(engines[1])})
    await gateway.close()


async def test_a_stream_goes_on_when_another_gateway_of_its_ingress_follows_the_same_replica(
    engines: list[Engine],
) -> None:
    """As one does that is made anew for a backbone that has other sizes than before."""
    link = LocalLink(engines[0])
    older, newer = (Gateway({ReplicaId("r0"): link}, ingress="i", settings=SETTINGS) for _ in range(2))
    await older.start()
    found = []
    async with asyncio.timeout(10), aclosing(older.generate(SAMPLED)) as stream:
        async for tokens in stream:
            found.append(tokens.token)
            if len(found) == 1:
                await newer.start()
                assert await said(newer, replace(SAMPLED, id="newer")) == await over({"r1": LocalLink(engines[1])})
    assert found == await over({"r1": LocalLink(engines[1])})
    for gateway in (older, newer):
        await gateway.close()


async def test_a_request_whose_replica_dies_each_time_is_given_up(engines: list[Engine]) -> None:
    with pytest.raises(Unavailable, match="8 times"):
        await over({"r0": Breaking(engines[0], 2, times=9)})
    with pytest.raises(Unavailable, match="3 replicas died"):  # the third while it was tried by itself
        await over({"r0": Breaking(engines[0], 0, times=9)})


class Silent(LocalLink):
    """Takes requests and says nothing of them."""

    async def submit(self, request: GenerationRequest) -> None:
        return None


async def test_a_graft_is_in_use_while_an_answer_is_made_with_it(engines: list[Engine]) -> None:
    gateway = Gateway({ReplicaId("r0"): Silent(engines[0])}, ingress="i", settings=SETTINGS)
    await gateway.start()
    answer = asyncio.ensure_future(anext(gateway.generate(replace(SAMPLED, graft=GraftId("g")))))
    while not gateway.used:
        await asyncio.sleep(0.01)
    assert gateway.used == {(SAMPLED.tenant, GraftId("g"))}, "who has the same graft waits for nobody's answers"
    answer.cancel()
    await asyncio.gather(answer, return_exceptions=True)
    assert not gateway.used
    await gateway.close()


async def test_requests_beyond_all_queues_are_refused_and_others_served(engines: list[Engine]) -> None:
    gateway = Gateway({ReplicaId("r0"): LocalLink(engines[0])}, ingress="i", settings=SETTINGS)
    await gateway.start()
    wanted = [replace(SAMPLED, id=f"a{i}") for i in range(6)]
    results = await asyncio.gather(*(said(gateway, one) for one in wanted), return_exceptions=True)
    assert sum(isinstance(result, Busy) for result in results) == 3
    assert len({tuple(result) for result in results if isinstance(result, list)}) == 1
    await gateway.close()


async def test_a_prompt_that_fits_no_replica_is_refused(engines: list[Engine]) -> None:
    with pytest.raises(TooLong):
        await over({"r0": LocalLink(engines[0])}, replace(SAMPLED, prompt_ids=(5,) * 5000))


async def test_leaving_early_ends_the_request(engines: list[Engine]) -> None:
    gateway = Gateway({ReplicaId("r0"): LocalLink(engines[0])}, ingress="i", settings=SETTINGS)
    await gateway.start()
    async with aclosing(gateway.generate(replace(SAMPLED, max_tokens=100))) as stream:
        async for tokens in stream:
            if tokens.index == 3:
                break
    for _ in range(100):
        if not engines[0].load.running:
            break
        await asyncio.sleep(0.02)
    assert engines[0].load.running == 0 and engines[0].load.free_blocks == engines[0].load.blocks
    await gateway.close()
