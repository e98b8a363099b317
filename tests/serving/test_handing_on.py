"""Which requests move from one replica to another, in which order, and which stay: message by message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from itertools import pairwise

import pytest

from polygraft.cluster.model import GraftId, ReplicaId
from polygraft.serving import gateway as gateway_module
from polygraft.serving.gateway import Gateway
from polygraft.serving.messages import StepMessage
from polygraft.serving.request import GenerationRequest
from tests.serving.test_published_once import FREE, SETTINGS, WANTED, Scripted, everything, gateway_over, token
from tests.serving.test_refusing import until, whole
from tests.serving.test_streams_through_change import Hurried

pytestmark = pytest.mark.anyio
FULL = replace(FREE, free_blocks=0)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def settled() -> None:
    """What is to be done now is done."""
    for _ in range(30):
        await asyncio.sleep(0)


async def underway(gateway: Gateway, replica: Scripted, ids: str) -> list[asyncio.Task[list[int | None]]]:
    """What clients read of requests of these ids, all of which the replica has been given."""
    works = [asyncio.create_task(everything(gateway, replace(WANTED, id=id))) for id in ids]
    for _ in works:
        await asyncio.wait_for(replica.submitted.get(), 5)
    return works


async def test_those_that_nothing_was_said_of_go_first_and_those_that_ended_meanwhile_stay() -> None:
    first, second = Scripted(), Scripted()
    async with gateway_over(r1=first, r0=second) as gateway:
        works = await underway(gateway, first, "abc")
        first.said.put_nowait(StepMessage((token(0, 10), token(0, 30, id="c")), FREE, draining=True))
        assert (await asyncio.wait_for(second.submitted.get(), 5)).id == "b"
        assert (await asyncio.wait_for(second.submitted.get(), 5)).id == "a"
        await settled()
        assert second.submitted.empty(), "the next one moved before the one before it had its next token"
        first.said.put_nowait(StepMessage((token(1, 31, id="c", end="stop"),), FREE, draining=True))
        assert await works[2] == [30, 31]
        second.say(*whole(1, 1), *(replace(one, request="b") for one in whole(1)))  # type: ignore[arg-type,type-var]
        assert await works[0] == await works[1] == [10, 11, 12, 13]
        await settled()
        assert second.submitted.empty() and sorted(first.cancelled) == ["a", "b"]


async def test_one_that_nothing_was_said_of_goes_to_a_queue_and_one_that_talks_only_where_it_starts_at_once() -> None:
    first, second = Scripted(), Scripted()
    async with gateway_over(r1=first, r0=second) as gateway:
        works = await underway(gateway, first, "ab")
        second.say(load=replace(FULL, running=1, waiting=1))
        await until(lambda: gateway.loads[ReplicaId("r0")].waiting)
        first.said.put_nowait(StepMessage((token(0, 10),), FREE, draining=True))
        assert (await asyncio.wait_for(second.submitted.get(), 5)).id == "b"
        await settled()
        assert second.submitted.empty() and first.cancelled == ["b"]
        second.say()
        assert (await asyncio.wait_for(second.submitted.get(), 5)).generated == (10,)
        second.say(*whole(1, 1), *(replace(one, request="b") for one in whole(1)))  # type: ignore[arg-type,type-var]
        assert await works[0] == await works[1] == [10, 11, 12, 13]


async def test_a_replica_that_drains_a_second_time_hands_its_streams_on_again() -> None:
    first, second = Scripted(), Scripted()
    async with gateway_over(r1=first, r0=second) as gateway:
        for id in "ab":
            work = asyncio.create_task(everything(gateway, replace(WANTED, id=id)))
            await asyncio.wait_for(first.submitted.get(), 5)
            first.said.put_nowait(StepMessage((), FREE, draining=True))
            assert (await asyncio.wait_for(second.submitted.get(), 5)).id == id
            second.say(*(replace(one, request=id) for one in whole(1)))  # type: ignore[arg-type,type-var]
            assert await work == [10, 11, 12, 13]
            first.say()
            await until(lambda: not gateway._roster.draining)


async def test_a_stream_whose_replica_goes_while_the_next_one_raises_over_it_goes_on_as_planned() -> None:
    first = Scripted()

    class Raising(Scripted):
        async def submit(self, request: GenerationRequest) -> None:
            if request.attempt == 1:
                first.said.put_nowait(None)
                await until(lambda: ReplicaId("r1") not in gateway.loads)
                raise RuntimeError("its own code")
            await super().submit(request)

    second = Raising()
    async with gateway_over(r1=first, r0=second) as gateway:
        work = asyncio.create_task(everything(gateway))
        await asyncio.wait_for(first.submitted.get(), 5)
        first.said.put_nowait(StepMessage((token(0, 10),), FREE, draining=True))
        assert (await asyncio.wait_for(second.submitted.get(), 5)).attempt == 2
        (stream,) = gateway._streams.values()
        assert stream.deaths == 0
        second.say(*whole(2, 1))  # type: ignore[arg-type]
        assert await work == [10, 11, 12, 13]


async def test_a_client_that_leaves_while_its_stream_is_offered_ends_it_where_it_came_from_and_where_it_went() -> None:
    class Slow(Scripted):
        def __init__(self) -> None:
            super().__init__()
            self.taken = asyncio.Event()

        async def submit(self, request: GenerationRequest) -> None:
            await super().submit(request)
            await self.taken.wait()

    first, second = Scripted(), Slow()
    async with gateway_over(r1=first, r0=second) as gateway:
        leaves, ends = await underway(gateway, first, "ab")
        first.said.put_nowait(StepMessage((token(0, 10), token(0, 20, id="b")), FREE, draining=True))
        assert (await asyncio.wait_for(second.submitted.get(), 5)).id == "a"
        first.said.put_nowait(StepMessage((token(1, 21, id="b", end="stop"),), FREE, draining=True))
        assert await ends == [20, 21]
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
        await settled()
        assert first.cancelled == second.cancelled == ["a"]
        second.taken.set()
        await settled()
        assert (first.cancelled, second.cancelled) == (["a"], ["a", "a"]), "it was ended before it was taken"
        assert second.submitted.empty()
        assert gateway._tasks == {*gateway._pumps.values(), gateway._balancing}, "what is over is forgotten"


async def test_a_request_that_waits_for_nobody_stays_and_one_that_waits_moves() -> None:
    """`a` and `c` wait at a replica; `b` and `d`, which came later, are being computed by another that has no room for
    more. A request a message moves, the last one first."""
    first, second, third = Scripted(), Scripted(), Scripted()
    async with gateway_over(r2=first, r1=second) as gateway:
        second.say(load=FULL)
        await until(lambda: not gateway.loads[ReplicaId("r1")].free_blocks)
        works = await underway(gateway, first, "ac")
        first.say(load=replace(FULL, running=1, waiting=2))
        await until(lambda: gateway.loads[ReplicaId("r2")].waiting)
        works.append(asyncio.create_task(everything(gateway, replace(WANTED, id="b"))))
        await asyncio.wait_for(second.submitted.get(), 5)
        second.say(load=replace(FULL, running=1))
        await until(lambda: gateway.loads[ReplicaId("r1")].running)
        works.append(asyncio.create_task(everything(gateway, replace(WANTED, id="d"))))
        await asyncio.wait_for(second.submitted.get(), 5)
        second.say(token(0, 10, id="d"), load=replace(FULL, running=2))
        await until(lambda: gateway.loads[ReplicaId("r1")].running == 2)
        gateway.follow({ReplicaId("r2"): first, ReplicaId("r1"): second, ReplicaId("r0"): third})
        assert (await asyncio.wait_for(third.submitted.get(), 5)).id == "c"
        await settled()
        assert third.submitted.empty()
        third.say(load=replace(FREE, running=1))
        assert (await asyncio.wait_for(third.submitted.get(), 5)).id == "a"
        for running in (2, 3):
            third.say(load=replace(FREE, running=running))
            await settled()
        assert third.submitted.empty() and second.cancelled == [] and first.cancelled == ["c", "a"]
        third.say(*(replace(one, request=id) for id in "ac" for one in whole(1)))  # type: ignore[arg-type,type-var]
        said = {"b": whole(), "d": whole(first=1)}
        second.say(*(replace(one, request=id) for id, each in said.items() for one in each))  # type: ignore[arg-type,type-var]
        assert [await work for work in works] == [[10, 11, 12, 13]] * 4


async def test_one_that_is_tried_by_itself_is_waited_for_though_nobody_else_waits_for_it_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gateway_module, "_BACKOFF_S", (0.001,))
    replica = Scripted()
    gateway = Gateway({ReplicaId("r"): replica}, ingress="i", settings=SETTINGS, ready_s=0.2)
    await gateway.start()
    work = asyncio.create_task(everything(gateway))
    for _ in range(2):
        await asyncio.wait_for(replica.submitted.get(), 5)
        replica.said.put_nowait(None)
    assert (await asyncio.wait_for(replica.submitted.get(), 5)).attempt == 2
    assert gateway._suspect.locked()
    await until(lambda: not gateway._suspect.locked())
    replica.say(*whole(2))  # type: ignore[arg-type]
    assert await work == [10, 11, 12, 13]
    await gateway.close()


class Warming(Scripted):
    """Never has a graft in memory; knows when it was asked for what."""

    def __init__(self) -> None:
        super().__init__()
        self.warmed: list[GraftId] = []
        self.times: list[float] = []

    async def warm(self, graft: GraftId) -> None:
        self.warmed.append(graft)
        await asyncio.Event().wait()

    async def submit(self, request: GenerationRequest) -> None:
        self.times.append(asyncio.get_running_loop().time())
        await super().submit(request)


def test_grafts_of_four_streams_are_loaded_ahead_and_neither_they_nor_a_silent_stream_hold_up_the_next_for_long() -> (
    None
):
    async def moved() -> None:
        first, second = Scripted(), Warming()
        async with gateway_over(r1=first, r0=second) as gateway:
            names = "abcdef"
            wanted = [replace(WANTED, id=name, graft=GraftId(name)) for name in names]
            works = [asyncio.create_task(everything(gateway, one)) for one in wanted]
            for _ in works:
                await first.submitted.get()
            begun = asyncio.get_running_loop().time()
            first.said.put_nowait(StepMessage(tuple(token(0, 10, id=name) for name in names), FREE, draining=True))
            await settled()
            assert second.warmed == [*"abcd"]
            await asyncio.sleep(25)
            assert second.warmed == [*"abcde"]
            waits = [now - before for now, before in zip(second.times, [begun, *second.times], strict=False)]
            assert waits == [pytest.approx(10, abs=0.5), pytest.approx(10, abs=0.5)]
            for work in works:
                work.cancel()

    with asyncio.Runner(loop_factory=Hurried) as runner:
        runner.run(moved())


def test_a_replica_that_does_not_answer_is_called_again_after_a_tenth_of_a_second_and_ever_more() -> None:
    class Away(Scripted):
        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        async def messages(self, ingress: str) -> AsyncGenerator[StepMessage, None]:
            self.times.append(asyncio.get_running_loop().time())
            if len(self.times) == 8:
                yield StepMessage((), FREE)
            raise ConnectionError("away")

    async def called() -> list[float]:
        replica = Away()
        gateway = Gateway({ReplicaId("r"): replica}, ingress="i", settings=SETTINGS)
        await gateway.start()
        await asyncio.sleep(8.5)
        await gateway.close()
        return [after - before for before, after in pairwise(replica.times)]

    with asyncio.Runner(loop_factory=Hurried) as runner:
        pauses = [0.1, 0.2, 0.5, 1.0, 2.0, 2.0, 2.0, 0.1, 0.2]
        assert runner.run(called()) == pytest.approx(pauses, abs=0.05)
