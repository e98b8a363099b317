"""Replicas that take no request, or say so late: whoever else can takes it, and nobody is counted as dead for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from polygraft.cluster.model import GraftId, ReplicaId
from polygraft.cluster.policy.scaling import Demand
from polygraft.cluster.settings import ServeSettings
from polygraft.serving.gateway import Gateway
from polygraft.serving.messages import Draining, QueueFull, StepMessage
from polygraft.serving.request import GenerationRequest
from tests.serving.test_published_once import FREE, SETTINGS, WANTED, Scripted, everything, gateway_over, token

pytestmark = pytest.mark.anyio
R0, R1 = ReplicaId("r0"), ReplicaId("r1")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Answering(Scripted):
    """Answers the first requests so, and takes those after them."""

    def __init__(self, *answers: QueueFull | Draining | Exception | float) -> None:
        super().__init__()
        self._answers = list(answers)
        self.asked: list[GenerationRequest] = []
        self.times: list[float] = []

    async def submit(self, request: GenerationRequest) -> QueueFull | Draining | None:  # type: ignore[override]
        self.asked.append(request)
        self.times.append(asyncio.get_running_loop().time())
        if not self._answers:
            return await super().submit(request)  # type: ignore[func-returns-value]
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            return None
        return answer


def whole(attempt: int = 0, first: int = 0) -> list[object]:
    last = token(3, 13, attempt=attempt, end="length")
    return [*(token(index, 10 + index, attempt=attempt) for index in range(first, 3)), last]


async def until(holds: object) -> None:
    async with asyncio.timeout(5):
        while not holds():  # type: ignore[operator]
            await asyncio.sleep(0)


@pytest.mark.parametrize("answer", [ConnectionError("gone"), 30.0])
async def test_a_replica_that_is_gone_or_silent_is_connected_to_again_and_another_takes_the_request(
    answer: Exception | float,
) -> None:
    first, second = Answering(answer), Scripted()
    async with gateway_over(r1=first, r0=second) as gateway:  # r1 is asked first, as both are idle
        gateway._silent_s = 0.05
        work = asyncio.create_task(everything(gateway))
        assert (await second.submitted.get()).attempt == 0
        second.say(*whole())  # type: ignore[arg-type]
        assert await work == [10, 11, 12, 13]
        await until(lambda: first.connections == 2 and first.open == 1 and R1 in gateway.loads)
        assert len(first.asked) == 1 and second.connections == 1


async def test_one_that_says_that_it_goes_is_asked_no_more_and_stays_connected() -> None:
    first, second = Answering(Draining()), Scripted()
    async with gateway_over(r1=first, r0=second) as gateway:
        for _ in range(2):
            work = asyncio.create_task(everything(gateway))
            await second.submitted.get()
            second.say(*whole())  # type: ignore[arg-type]
            assert await work == [10, 11, 12, 13]
        assert len(first.asked) == 1 and first.connections == second.connections == 1


async def test_one_that_has_been_under_way_waits_for_a_place_and_is_not_refused() -> None:
    replica = Answering()
    async with gateway_over(r=replica) as gateway:
        work = asyncio.create_task(everything(gateway))
        await replica.submitted.get()
        replica.say(token(0, 10))
        replica._answers = [QueueFull(0.01), QueueFull(0.02)]
        replica.said.put_nowait(None)
        again = await asyncio.wait_for(replica.submitted.get(), 5)
        assert (again.attempt, again.generated, len(replica.asked)) == (1, (10,), 4)
        assert replica.times[2] - replica.times[1] >= 0.01 and replica.times[3] - replica.times[2] >= 0.02
        replica.say(*whole(1, 1))  # type: ignore[arg-type]
        assert await work == [10, 11, 12, 13]


async def test_a_stream_stays_where_it_is_while_the_next_replica_raises_over_it() -> None:
    first, second = Scripted(), Answering(RuntimeError("its own code"))
    async with gateway_over(r1=first, r0=second) as gateway:
        work = asyncio.create_task(everything(gateway))
        await first.submitted.get()
        first.say(token(0, 10))
        first.said.put_nowait(StepMessage((), FREE, draining=True))
        await until(lambda: second.asked)
        assert second.submitted.empty()
        first.said.put_nowait(StepMessage((token(1, 11),), FREE, draining=True))
        again = await asyncio.wait_for(second.submitted.get(), 5)
        assert (again.attempt, again.generated) == (2, (10, 11))
        second.say(*whole(2, 2))  # type: ignore[arg-type]
        assert await work == [10, 11, 12, 13]
        await until(lambda: first.cancelled)
        assert first.cancelled == ["a"] and second.cancelled == []


async def test_a_graft_is_brought_in_before_its_stream_moves() -> None:
    class Warming(Scripted):
        def __init__(self) -> None:
            super().__init__()
            self.warmed: list[GraftId] = []

        async def warm(self, graft: GraftId) -> None:
            self.warmed.append(graft)

    first, second = Scripted(), Warming()
    async with gateway_over(r1=first, r0=second) as gateway:
        work = asyncio.create_task(everything(gateway, replace(WANTED, graft=GraftId("g"))))
        await first.submitted.get()
        first.say(token(0, 10))
        first.said.put_nowait(StepMessage((), FREE, draining=True))
        again = await asyncio.wait_for(second.submitted.get(), 5)
        assert again.generated == (10,) and second.warmed == ["g"]
        second.say(*whole(1, 1))  # type: ignore[arg-type]
        assert await work == [10, 11, 12, 13]


async def test_a_place_that_was_just_given_away_is_given_to_nobody_else() -> None:
    first, second = Scripted(), Scripted()
    settings = ServeSettings(max_context=128, max_streams=1)
    gateway = Gateway({R1: first, R0: second}, ingress="i", settings=settings)
    await gateway.start()
    await until(lambda: len(gateway.loads) == 2)
    works = [asyncio.create_task(everything(gateway, replace(WANTED, id=id))) for id in "ab"]
    assert (await asyncio.wait_for(first.submitted.get(), 5)).id == "a"
    assert (await asyncio.wait_for(second.submitted.get(), 5)).id == "b"
    for work in works:
        work.cancel()
    await gateway.close()


async def test_a_place_that_was_not_taken_is_given_to_the_next_request() -> None:
    first, second = Answering(QueueFull(9.0)), Scripted()
    gateway = Gateway({R1: first, R0: second}, ingress="i", settings=ServeSettings(max_context=128, max_streams=1))
    await gateway.start()
    await until(lambda: len(gateway.loads) == 2)
    works = [asyncio.create_task(everything(gateway, replace(WANTED, id="a")))]
    assert (await asyncio.wait_for(second.submitted.get(), 5)).id == "a"
    works.append(asyncio.create_task(everything(gateway, replace(WANTED, id="b"))))
    assert (await asyncio.wait_for(first.submitted.get(), 5)).id == "b"
    for work in works:
        work.cancel()
    await gateway.close()


async def test_a_request_that_the_only_replica_did_not_take_is_one_that_waits_for_a_replica() -> None:
    replica = Answering(Draining())
    async with gateway_over(r=replica) as gateway:
        work = asyncio.create_task(everything(gateway))
        await until(lambda: replica.asked and gateway.demand == Demand(0, 1))
        work.cancel()


async def test_a_replica_that_is_found_gone_has_died_under_the_streams_it_had() -> None:
    first, second = Answering(), Scripted()
    async with gateway_over(r1=first, r0=second) as gateway:
        works = [asyncio.create_task(everything(gateway, replace(WANTED, id="a")))]
        await first.submitted.get()
        first._answers = [ConnectionError("gone")]
        works.append(asyncio.create_task(everything(gateway, replace(WANTED, id="b"))))
        there = {(await asyncio.wait_for(second.submitted.get(), 5)).id for _ in range(2)}
        assert there == {"a", "b"}
        assert {id: stream.deaths for id, stream in gateway._streams.items()} == {"a": 1, "b": 0}
        for work in works:
            work.cancel()


async def test_a_client_that_leaves_while_its_stream_moves_holds_up_no_other() -> None:
    first, second = Scripted(), Scripted()
    async with gateway_over(r1=first, r0=second) as gateway:
        ann, bob = (asyncio.create_task(everything(gateway, replace(WANTED, id=id))) for id in "ab")
        for _ in range(2):
            await first.submitted.get()
        first.say(token(0, 66), token(0, 10, id="b"))
        first.said.put_nowait(StepMessage((), FREE, draining=True))
        assert (await asyncio.wait_for(second.submitted.get(), 5)).id == "a"
        ann.cancel()
        again = await asyncio.wait_for(second.submitted.get(), 5)
        assert (again.id, again.generated) == ("b", (10,))
        second.say(*(replace(one, request="b") for one in whole(1, 1)))  # type: ignore[arg-type, type-var]
        assert await bob == [10, 11, 12, 13]


async def test_nothing_of_a_gateway_goes_on_when_it_has_closed() -> None:
    class Slow(Scripted):
        left = False

        async def messages(self, ingress: str) -> AsyncGenerator[StepMessage, None]:
            try:
                async for message in super().messages(ingress):
                    yield message
            finally:
                await asyncio.sleep(0.01)
                self.left = True

    replica = Slow()
    async with gateway_over(r=replica):
        pass
    assert replica.left


async def test_what_is_wanted_are_the_requests_that_replicas_have_and_those_that_met_none() -> None:
    replica = Scripted()
    alone = Gateway({}, ingress="i", settings=SETTINGS)
    await alone.start()
    waits = asyncio.create_task(everything(alone))
    await until(lambda: alone.demand.total)
    assert alone.demand == Demand(0, 1) and not alone.ready() and alone.loads == {}
    alone.follow({R0: replica})
    wanted = await asyncio.wait_for(replica.submitted.get(), 5)
    assert alone.demand == Demand(1, 0) and alone.ready() and alone.loads == {R0: FREE} and wanted.ingress == alone.name
    replica.say(*whole())  # type: ignore[arg-type]
    assert await waits == [10, 11, 12, 13] and alone.demand == Demand()
    alone.follow({})
    assert not alone.ready()
    await alone.close()


async def test_a_replica_that_is_no_more_wanted_hands_its_streams_to_the_others_as_planned() -> None:
    first, second = Scripted(), Scripted()
    async with gateway_over(r1=first, r0=second) as gateway:
        work = asyncio.create_task(everything(gateway))
        await first.submitted.get()
        for replica, other in ((R1, {R0: second}), (R0, {R1: first})):  # more often than replicas may die of it
            gateway.follow({R0: second, R1: first})
            await until(lambda: len(gateway.loads) == 2)
            gateway.follow(other)
            assert replica not in gateway.loads
            await asyncio.wait_for(next(iter(other.values())).submitted.get(), 5)
        (stream,) = gateway._streams.values()
        assert stream.deaths == 0 and stream.request.attempt == 2
        first.say(*whole(2))  # type: ignore[arg-type]
        assert await work == [10, 11, 12, 13]


async def test_a_stream_that_lost_its_replica_waits_no_longer_than_the_first_full_one_says() -> None:
    first, long, short = Scripted(), Answering(QueueFull(60.0)), Answering(QueueFull(0.01))
    async with gateway_over(r2=first, r1=long, r0=short) as gateway:
        work = asyncio.create_task(everything(gateway))
        await asyncio.wait_for(first.submitted.get(), 5)
        first.say(token(0, 10))
        (stream,) = gateway._streams.values()
        await until(lambda: stream.tokens)
        gateway.follow({R1: long, R0: short})
        assert (await asyncio.wait_for(long.submitted.get(), 5)).generated == (10,)
        assert len(long.asked) == 2 and len(short.asked) == 1
        long.say(*whole(1, 1))  # type: ignore[arg-type]
        assert await work == [10, 11, 12, 13]
