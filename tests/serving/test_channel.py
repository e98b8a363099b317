"""What a replica says reaches an ingress as it was said, and nobody else; what that one asks is answered in order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import astuple, fields, replace
from types import MappingProxyType

import pytest

from polygraft.cluster.model import GraftId, TenantId
from polygraft.serving import wire
from polygraft.serving.channel import Address, Channel, Connection, connected
from polygraft.serving.messages import Draining, Load, QueueFull, StepMessage, StepTokens, Tally
from polygraft.serving.request import GenerationRequest
from polygraft.serving.wire import Answer
from tests.serving.engines import request

pytestmark = pytest.mark.anyio
MESSAGE = StepMessage((StepTokens("a", 0, 7, found=3), StepTokens("b", 2, None, "error", 1, "no")), Load(running=2))
Messages = Callable[[str], AsyncGenerator[StepMessage, None]]
Answers = Mapping[str, Answer | ConnectionError]


async def open_for_ever(ingress: str) -> AsyncGenerator[StepMessage, None]:
    yield MESSAGE
    await asyncio.Event().wait()


class Saying:
    """A replica that says `messages`, and gives each request the answer that stands under its id."""

    def __init__(self, messages: Messages = open_for_ever, answers: Answers = MappingProxyType({})) -> None:
        self.messages, self._answers = messages, answers
        self.asked: list[GenerationRequest | str] = []

    async def submit(self, request: GenerationRequest) -> QueueFull | Draining | None:
        self.asked.append(request)
        answer = self._answers.get(request.id)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def cancel(self, request: str) -> None:
        self.asked.append(request)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def told(address: Address, ingress: str = "i") -> list[StepMessage]:
    async with asyncio.timeout(10.0):
        return [message async for message in (await connected(address, ingress)).messages()]


@asynccontextmanager
async def followed(replica: Saying) -> AsyncIterator[Connection]:
    """A connection of ingress "i" whose messages are read meanwhile."""
    connection = await connected(await Channel(replica).open("127.0.0.1"), "i")

    async def follow() -> None:
        with suppress(EOFError):
            async for _ in connection.messages():
                pass

    following = asyncio.ensure_future(follow())
    try:
        async with asyncio.timeout(10.0):
            yield connection
    finally:
        following.cancel()


def test_a_message_comes_out_as_it_went_in() -> None:
    """Each field with a value that is no other's."""
    tally = Tally(1, 2, 0.1, 4, 1 / 3, 6, 7, 1e-300, 9, 10, 11)
    load = Load(12, 13, 14, 15, (GraftId("a"), GraftId("b")), 16, 17, tally)
    ended = StepTokens("c", 18, 19, "error", 20, 'ö"\n\ud800', "out_of_memory", (0.1, 1 / 3), 21)
    for message in (MESSAGE, StepMessage((*MESSAGE.tokens, ended), load, draining=True)):
        assert wire.heard(wire.telling(message)) == message
    assert len({*astuple(load)[:4], *astuple(load)[5:7], *astuple(tally)}) == 17


async def test_each_ingress_hears_its_own_messages_in_order_to_the_end() -> None:
    async def messages(ingress: str) -> AsyncGenerator[StepMessage, None]:
        for n in range(200):
            yield replace(MESSAGE, load=Load(waiting=n, resident=(GraftId(f"{ingress}{n}" * 1000),)))

    address = await Channel(Saying(messages)).open("127.0.0.1")
    both = await asyncio.gather(told(address, "i"), told(address, "j"))
    assert list(both) == [[message async for message in messages(ingress)] for ingress in "ij"]


async def test_who_does_not_know_the_secret_hears_nothing() -> None:
    asked: list[str] = []

    async def messages(ingress: str) -> AsyncGenerator[StepMessage, None]:
        asked.append(ingress)
        yield MESSAGE

    address = await Channel(Saying(messages)).open("127.0.0.1")
    for secret in ("", "x" * len(address.secret), "é", "x" * 5000):
        with pytest.raises((EOFError, OSError)):
            await told(replace(address, secret=secret))
    assert not asked and await told(address) == [MESSAGE]


async def test_a_replica_that_fails_does_not_end_as_one_that_is_done() -> None:
    async def messages(ingress: str) -> AsyncGenerator[StepMessage, None]:
        yield MESSAGE
        raise ConnectionError("it ends")

    address = await Channel(Saying(messages)).open("127.0.0.1")
    async with aclosing((await connected(address, "i")).messages()) as stream:
        assert await anext(stream) == MESSAGE
        with pytest.raises(EOFError):
            await anext(stream)


async def test_who_hangs_up_is_known_to_be_gone_though_nothing_is_said() -> None:
    gone = asyncio.Event()

    async def messages(ingress: str) -> AsyncGenerator[StepMessage, None]:
        try:
            yield MESSAGE
            await asyncio.Event().wait()
        finally:
            gone.set()

    address = await Channel(Saying(messages)).open("127.0.0.1")
    async with aclosing((await connected(address, "i")).messages()) as stream:
        assert await anext(stream) == MESSAGE
    async with asyncio.timeout(10.0):
        await gone.wait()


def test_what_is_asked_comes_out_as_it_went_in() -> None:
    whole = GenerationRequest(
        id="a",
        tenant=TenantId("b"),
        graft=GraftId("c"),
        prompt_ids=(1, 2),
        max_tokens=9,
        temperature=1 / 3,
        top_p=0.1,
        top_k=3,
        min_p=1e-300,
        seed=2**63 - 1,
        eos_ids=(4,),
        ignore_eos=True,
        min_tokens=5,
        generated=(6, 7),
        attempt=8,
        ingress="d",
        prefix=10,
        classifies=True,
    )
    for question in (whole, request("a", (5,), 1), "a", 'ö"\n'):
        assert wire.asked(wire.asking(question)) == question
    left = [one.name for one in fields(whole) if getattr(whole, one.name) == one.default]
    assert not left, "each field has a value that is not its default"


@pytest.mark.parametrize(
    "wrong",
    [{"max_tokens": "3"}, {"max_tokens": 0}, {"prompt_ids": [1, None]}, {"prompt_ids": []}, {"seed": 0.5}, {"more": 1}],
)
def test_what_is_no_request_is_refused(wrong: dict[str, object]) -> None:
    said = json.loads(wire.asking(request("a", (5,), 3)))
    with pytest.raises(ValueError, match=next(iter(wrong))):
        wire.asked(json.dumps(said | wrong).encode())


async def test_each_question_gets_its_own_answer() -> None:
    answers: Answers = {
        "full": QueueFull(2.5),
        "goes": Draining(),
        "fails": RuntimeError("it cannot"),
        "taken": None,
    }
    replica = Saying(answers=answers)

    async def answer(connection: Connection, id: str) -> Answer:
        try:
            return await connection.submit(request(id, (5,), 1, ingress="i"))
        except RuntimeError as error:
            return error

    async with followed(replica) as connection:
        found = await asyncio.gather(*(answer(connection, id) for id in answers))
        await connection.cancel("taken")
        impatient = asyncio.ensure_future(answer(connection, "goes"))
        await asyncio.sleep(0)
        impatient.cancel()
        assert await answer(connection, "full") == QueueFull(2.5), "not what was said to one that waits no more"
    assert (found[0], found[1], found[3]) == (QueueFull(2.5), Draining(), None)
    assert str(found[2]) == "RuntimeError: it cannot"
    assert replica.asked[4] == "taken"


async def test_a_request_in_the_name_of_another_ingress_and_one_that_is_too_large_fail_alone() -> None:
    replica = Saying()
    async with followed(replica) as connection:
        with pytest.raises(RuntimeError, match="'j' asks at the connection of 'i'"):
            await connection.submit(request("a", (5,), 1, ingress="j"))
        with pytest.raises(RuntimeError, match="of a frame"):
            await connection.submit(request("b", (10**6,) * 2_200_000, 1, ingress="i"))
        assert await connection.submit(request("c", (5,), 1, ingress="i")) is None
    assert [asked.id for asked in replica.asked if isinstance(asked, GenerationRequest)] == ["c"]


async def test_who_asks_a_replica_that_goes_knows_at_once() -> None:
    async with followed(Saying(answers={"cut": ConnectionError()})) as connection:
        for _ in range(2):  # while it goes, and when it is gone
            with pytest.raises(ConnectionError):
                await connection.submit(request("cut", (5,), 1, ingress="i"))


async def test_a_frame_that_is_too_large_is_not_waited_for() -> None:
    address = await Channel(Saying()).open("127.0.0.1")
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(f"{address.secret} i\n".encode() + b"\xff" * 4)
    async with asyncio.timeout(10.0):
        assert await reader.read() == wire.framed(wire.telling(MESSAGE))
    writer.close()
