"""(request, index) is published once: what a gateway hands on of what replicas say, message by message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest

from polygraft.cluster.model import GraftId, ReplicaId
from polygraft.cluster.settings import ServeSettings
from polygraft.serving.gateway import Busy, Gateway, Unavailable
from polygraft.serving.messages import FinishReason, Load, QueueFull, StepMessage, StepTokens
from polygraft.serving.request import GenerationRequest
from tests.serving.engines import request

pytestmark = pytest.mark.anyio
SETTINGS = ServeSettings(max_context=128)
WANTED = request("a", (5, 6, 7), 4)
FREE = Load(blocks=99, free_blocks=99)


class Scripted:
    """A replica that says what the test puts into its mouth; `None` breaks the connection."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[StepMessage | None] = asyncio.Queue()
        self.submitted: asyncio.Queue[GenerationRequest] = asyncio.Queue()
        self.cancelled: list[str] = []
        self.connections = self.open = 0
        self.stopped = False  # it takes calls, and answers none

    def say(self, *tokens: StepTokens, load: Load = FREE) -> None:
        self.said.put_nowait(StepMessage(tokens, load))

    async def submit(self, request: GenerationRequest) -> None:
        self.submitted.put_nowait(request)

    async def cancel(self, request: str) -> None:
        self.cancelled.append(request)

    async def warm(self, graft: GraftId) -> None:
        return None

    async def attend(self, ingress: str) -> None:
        while self.stopped:
            await asyncio.sleep(0.01)

    async def messages(self, ingress: str) -> AsyncGenerator[StepMessage, None]:
        self.connections += 1
        self.open += 1
        try:
            yield StepMessage((), FREE)
            while (message := await self.said.get()) is not None:
                yield message
            raise ConnectionError("cut")
        finally:
            self.open -= 1


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def token(index: int, value: int, *, attempt: int = 0, id: str = "a", end: FinishReason | None = None) -> StepTokens:
    return StepTokens(id, index, value, end, attempt)


@asynccontextmanager
async def gateway_over(**links: Scripted) -> AsyncIterator[Gateway]:
    gateway = Gateway({ReplicaId(name): link for name, link in links.items()}, ingress="i", settings=SETTINGS)
    await gateway.start()
    while len(gateway._roster.loads) < len(links):
        await asyncio.sleep(0)
    try:
        yield gateway
    finally:
        await gateway.close()


async def everything(gateway: Gateway, wanted: GenerationRequest = WANTED) -> list[int | None]:
    return [tokens.token async for tokens in gateway.generate(wanted)]


async def test_a_token_said_twice_is_handed_on_once() -> None:
    replica = Scripted()
    async with gateway_over(r=replica) as gateway:
        work = asyncio.create_task(everything(gateway))
        await replica.submitted.get()
        replica.say(token(0, 10))
        replica.say(token(0, 11), token(1, 12))
        replica.say(token(1, 12), token(0, 10), token(2, 13), token(3, 14, end="length"))
        assert await work == [10, 12, 13, 14]


async def test_an_older_attempts_words_are_dropped_whoever_says_them() -> None:
    """The replica that was lost comes back in the middle of the second attempt and goes on with the first."""
    replica = Scripted()
    async with gateway_over(r=replica) as gateway:
        work = asyncio.create_task(everything(gateway))
        await replica.submitted.get()
        replica.say(token(0, 10))
        replica.said.put_nowait(None)
        again = await replica.submitted.get()
        assert (again.attempt, again.generated) == (1, (10,))
        replica.say(token(1, 66, end="stop"))  # of attempt 0, at the very index that is awaited
        replica.say(token(1, 12, attempt=1), token(2, 13, attempt=1), token(3, 14, attempt=1, end="length"))
        assert await work == [10, 12, 13, 14]


async def test_a_replica_that_no_longer_has_the_stream_is_not_listened_to() -> None:
    """r0 is slow to notice that its connection broke: what it says afterwards belongs to nobody."""
    first, second = Scripted(), Scripted()
    async with gateway_over(r1=first, r0=second) as gateway:
        work = asyncio.create_task(everything(gateway))
        await first.submitted.get()
        first.said.put_nowait(None)
        again = await second.submitted.get()
        assert again.attempt == 1
        first.say(token(0, 66, attempt=1))  # a replica with no right to that attempt
        while first.connections < 2 or first.said.qsize():
            await asyncio.sleep(0.01)
        second.say(*(token(index, 10 + index, attempt=1) for index in range(3)), token(3, 13, attempt=1, end="length"))
        assert await work == [10, 11, 12, 13]


async def test_losing_a_replica_moves_its_own_streams_only() -> None:
    first, second = Scripted(), Scripted()
    async with gateway_over(r1=first, r0=second) as gateway:
        kept = asyncio.create_task(everything(gateway))
        await first.submitted.get()
        first.say(token(0, 10), load=replace(FREE, free_blocks=0))  # full: the next request goes elsewhere
        while gateway._roster.loads[ReplicaId("r1")].free_blocks:
            await asyncio.sleep(0)
        lost = asyncio.create_task(everything(gateway, replace(WANTED, id="b")))
        await second.submitted.get()
        second.said.put_nowait(None)
        again = await asyncio.wait_for(first.submitted.get(), 5)
        assert (again.id, again.attempt) == ("b", 1) and first.submitted.empty()
        first.say(*(token(index, 10 + index) for index in (1, 2)), token(3, 13, end="length"))
        first.say(token(0, 20, attempt=1, id="b", end="stop"))
        assert await kept == [10, 11, 12, 13] and await lost == [20]
        assert first.cancelled == second.cancelled == []


async def test_a_stream_with_a_gap_is_asked_for_again_from_the_gap_on() -> None:
    """A message that never came must not leave its client waiting for ever."""
    replica = Scripted()
    async with gateway_over(r=replica) as gateway:
        work = asyncio.create_task(everything(gateway))
        await replica.submitted.get()
        replica.say(token(0, 10))
        replica.say(token(2, 13))
        again = await asyncio.wait_for(replica.submitted.get(), 5)
        assert (again.attempt, again.generated) == (1, (10,))
        replica.say(token(3, 66, end="length"))
        replica.say(token(1, 12, attempt=1), token(2, 13, attempt=1), token(3, 14, attempt=1, end="length"))
        assert await work == [10, 12, 13, 14]


class Dying(Scripted):
    """Says a token of each request a turn, all together; dies as soon as it has the killer."""

    def __init__(self) -> None:
        super().__init__()
        self.deaths: list[set[str]] = []
        self._has: dict[str, GenerationRequest] = {}

    async def submit(self, request: GenerationRequest) -> None:
        self._has[request.id] = request

    async def messages(self, ingress: str) -> AsyncGenerator[StepMessage, None]:
        self._has.clear()
        yield StepMessage((), FREE)
        said: dict[str, int] = {}
        while True:
            await asyncio.sleep(0.001)
            if "killer" in self._has:
                self.deaths.append(set(self._has))
                raise ConnectionError("dead")
            for id, wanted in list(self._has.items()):
                index = said.get(id, len(wanted.generated))
                said[id] = index + 1
                last = index + 1 == wanted.max_tokens
                end: FinishReason | None = "length" if last else None
                yield StepMessage((token(index, index, attempt=wanted.attempt, id=id, end=end),), FREE)
                if last:
                    del self._has[id]


async def test_a_request_that_replicas_die_of_is_given_up_alone_and_those_beside_it_get_their_answers() -> None:
    replica = Dying()
    async with gateway_over(r=replica) as gateway:
        names = ("a", "b", "killer", "c")
        work = [asyncio.create_task(everything(gateway, replace(WANTED, id=name))) for name in names]
        found = await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), 20)
    assert [one for name, one in zip(names, found, strict=True) if name != "killer"] == [[0, 1, 2, 3]] * 3
    assert isinstance(found[2], Unavailable)
    assert len(replica.deaths) == 3


async def test_a_client_that_hangs_up_while_its_request_is_on_the_way_ends_it_at_the_replica() -> None:
    class Slow(Scripted):
        async def submit(self, request: GenerationRequest) -> None:
            self.submitted.put_nowait(request)
            await asyncio.sleep(30)

    replica = Slow()
    async with gateway_over(r=replica) as gateway:
        work = asyncio.create_task(everything(gateway))
        await replica.submitted.get()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        while not replica.cancelled:
            await asyncio.sleep(0)
        assert replica.cancelled == ["a"] and not gateway._streams


async def test_that_a_replica_is_gone_when_it_should_end_a_request_is_nobodys_failure() -> None:
    class Gone(Scripted):
        async def cancel(self, request: str) -> None:
            self.cancelled.append(request)
            raise ConnectionError("gone")

    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    replica = Gone()
    async with gateway_over(r=replica) as gateway:
        async with aclosing(gateway.generate(WANTED)) as stream:
            replica.say(token(0, 10))
            assert (await anext(stream)).token == 10
        tasks = gateway._tasks - {*gateway._pumps.values(), gateway._balancing}
        assert await asyncio.gather(*tasks) == [None] and replica.cancelled == ["a"]
    assert not failures


async def test_a_stream_is_given_up_after_eight_attempts_however_far_it_came() -> None:
    replica, wanted = Scripted(), replace(WANTED, max_tokens=20)
    async with gateway_over(r=replica) as gateway:
        work = asyncio.create_task(everything(gateway, wanted))
        for attempt in range(8):
            assert (await replica.submitted.get()).attempt == attempt
            replica.say(token(attempt, attempt, attempt=attempt))
            replica.said.put_nowait(None)
        with pytest.raises(Unavailable, match="8 times"):
            await work
        assert replica.submitted.empty()


async def test_a_full_queue_is_told_with_the_shortest_of_the_waits() -> None:
    class Full(Scripted):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self._seconds = seconds

        async def submit(self, request: GenerationRequest) -> QueueFull:  # type: ignore[override]
            return QueueFull(self._seconds)

    async with gateway_over(r=Full(9.0), q=Full(4.0)) as gateway:
        with pytest.raises(Busy, match="wait already") as found:
            await everything(gateway)
        assert found.value.retry_after_s == 4.0 and not gateway._streams
