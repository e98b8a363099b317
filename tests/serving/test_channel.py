"""What a replica says reaches an ingress as it was said, and nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import astuple, replace

import pytest

from polygraft.cluster.model import GraftId
from polygraft.serving.channel import Address, Channel, heard, packed, unpacked
from polygraft.serving.messages import Load, StepMessage, StepTokens, Tally

pytestmark = pytest.mark.anyio
MESSAGE = StepMessage((StepTokens("a", 0, 7, found=3), StepTokens("b", 2, None, "error", 1, "no")), Load(running=2))
Messages = Callable[[str], AsyncGenerator[StepMessage, None]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def told(address: Address, ingress: str = "i") -> list[StepMessage]:
    async with asyncio.timeout(10.0):
        return [message async for message in heard(address, ingress)]


def test_a_message_comes_out_as_it_went_in() -> None:
    """Each field with a value that is no other's."""
    tally = Tally(1, 2, 0.1, 4, 1 / 3, 6, 7, 1e-300, 9, 10, 11)
    load = Load(12, 13, 14, 15, (GraftId("a"), GraftId("b")), 16, 17, tally)
    ended = StepTokens("c", 18, 19, "error", 20, 'ö"\n\ud800', "out_of_memory", (0.1, 1 / 3), 21)
    for message in (MESSAGE, StepMessage((*MESSAGE.tokens, ended), load, draining=True)):
        assert unpacked(packed(message)) == message
    assert len({*astuple(load)[:4], *astuple(load)[5:7], *astuple(tally)}) == 17


async def test_each_ingress_hears_its_own_messages_in_order_to_the_end() -> None:
    async def messages(ingress: str) -> AsyncGenerator[StepMessage, None]:
        for n in range(200):
            yield replace(MESSAGE, load=Load(waiting=n, resident=(GraftId(f"{ingress}{n}" * 1000),)))

    address = await Channel(messages).open("127.0.0.1")
    both = await asyncio.gather(told(address, "i"), told(address, "j"))
    assert list(both) == [[message async for message in messages(ingress)] for ingress in "ij"]


async def test_who_does_not_know_the_secret_hears_nothing() -> None:
    asked: list[str] = []

    async def messages(ingress: str) -> AsyncGenerator[StepMessage, None]:
        asked.append(ingress)
        yield MESSAGE

    address = await Channel(messages).open("127.0.0.1")
    for secret in ("", "x" * len(address.secret), "é", "x" * 5000):
        with pytest.raises((EOFError, OSError)):
            await told(replace(address, secret=secret))
    assert not asked and await told(address) == [MESSAGE]


async def test_a_replica_that_fails_does_not_end_as_one_that_is_done() -> None:
    async def messages(ingress: str) -> AsyncGenerator[StepMessage, None]:
        yield MESSAGE
        raise ConnectionError("it ends")

    address = await Channel(messages).open("127.0.0.1")
    async with aclosing(heard(address, "i")) as stream:
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

    address = await Channel(messages).open("127.0.0.1")
    async with aclosing(heard(address, "i")) as stream:
        assert await anext(stream) == MESSAGE
    async with asyncio.timeout(10.0):
        await gone.wait()
