"""Processes that are stopped, not dead: nothing breaks, and nothing is said. Each end of a connection finds out, and
what a stopped one says when it goes on is heard by nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from polygraft.cluster.model import ReplicaId
from polygraft.cluster.settings import ServeSettings
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving.gateway import Gateway
from polygraft.serving.local import LocalLink
from polygraft.serving.messages import StepMessage
from polygraft.serving.request import GenerationRequest
from tests.serving.engines import engine_on, request
from tests.serving.test_published_once import Scripted, everything, token
from tests.tiny import tiny_llama

pytestmark = pytest.mark.anyio
SILENT_S = 0.2


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32)


async def test_the_streams_of_a_replica_that_does_not_answer_go_on_at_another() -> None:
    first, second = Scripted(), Scripted()
    links = {ReplicaId("r1"): first, ReplicaId("r0"): second}
    gateway = Gateway(links, ingress="i", settings=ServeSettings(max_context=128, silent_s=SILENT_S))
    await gateway.start()
    while len(gateway.loads) < 2:
        await asyncio.sleep(0)
    work = asyncio.create_task(everything(gateway))
    await first.submitted.get()
    first.say(token(0, 10))
    first.stopped = True
    again = await asyncio.wait_for(second.submitted.get(), 5)
    assert (again.attempt, again.generated) == (1, (10,))
    first.stopped = False
    first.say(token(1, 66), token(2, 67), token(3, 68, end="length"))  # what it had computed in the meantime
    while first.said.qsize():
        await asyncio.sleep(0.01)
    second.say(*(token(index, 10 + index, attempt=1) for index in (1, 2)), token(3, 13, attempt=1, end="length"))
    assert await work == [10, 11, 12, 13]
    await gateway.close()


async def test_a_request_that_a_replica_neither_takes_nor_refuses_goes_to_another() -> None:
    class Stopped(Scripted):
        async def submit(self, request: GenerationRequest) -> None:
            self.submitted.put_nowait(request)
            self.stopped = True
            await asyncio.sleep(30)

    first, second = Stopped(), Scripted()
    links = {ReplicaId("r1"): first, ReplicaId("r0"): second}
    gateway = Gateway(links, ingress="i", settings=ServeSettings(max_context=128, silent_s=SILENT_S))
    await gateway.start()
    while len(gateway.loads) < 2:
        await asyncio.sleep(0)
    work = asyncio.create_task(everything(gateway))
    await first.submitted.get()
    again = await asyncio.wait_for(second.submitted.get(), 5)
    assert again.generated == ()
    second.say(*(token(n, 10 + n, attempt=again.attempt) for n in range(3)))
    second.say(token(3, 13, attempt=again.attempt, end="length"))
    assert await work == [10, 11, 12, 13]
    await gateway.close()


async def test_a_replica_that_answers_and_says_nothing_is_waited_for() -> None:
    replica = Scripted()
    settings = ServeSettings(max_context=128, silent_s=SILENT_S)
    gateway = Gateway({ReplicaId("r"): replica}, ingress="i", settings=settings)
    await gateway.start()
    work = asyncio.create_task(everything(gateway))
    await replica.submitted.get()
    await asyncio.sleep(3 * SILENT_S)
    replica.say(*(token(index, 10 + index) for index in range(3)), token(3, 13, end="length"))
    assert await work == [10, 11, 12, 13] and replica.connections == 1
    await gateway.close()


async def test_the_requests_of_an_ingress_that_is_not_heard_of_end(backbone: Backbone, tmp_path: Path) -> None:
    engine = engine_on(backbone, tmp_path)
    link = LocalLink(engine, silent_s=SILENT_S)
    heard: list[StepMessage] = []

    async def read() -> None:
        heard.extend([message async for message in link.messages("gone")])

    reading = asyncio.create_task(read())
    while not engine.hears("gone"):
        await asyncio.sleep(0)
    for _ in range(6):  # as long as it attends, it is there
        await asyncio.sleep(SILENT_S / 2)
        await link.attend("gone")
    assert not reading.done()
    await link.submit(request("a", (5, 6, 7), 100, ingress="gone"))
    engine.turn()
    assert engine.load.running == 1
    await asyncio.wait_for(reading, 5)
    engine.turn()
    assert engine.load.running == 0 and not engine.hears("gone")
    with pytest.raises(ConnectionError, match="does not follow"):
        await link.submit(request("b", (5, 6, 7), 4, ingress="gone"))
    engine.stop()
