"""A TCP connection between a replica and an ingress: the ingress asks, the replica answers and says its tokens.

A call of Ray's, and an item of its generators, pass through five threads of two processes on their way, and there is
an item every step.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from hmac import compare_digest
from secrets import token_hex
from typing import Protocol

from polygraft.serving import wire
from polygraft.serving.messages import Draining, QueueFull, StepMessage
from polygraft.serving.request import GenerationRequest
from polygraft.serving.wire import END, Answer, Question

_ASK_S = 10.0  # for whoever connects to say who it is


@dataclass(frozen=True, slots=True)
class Address:
    """Where a replica is reached, by whoever knows its `secret`."""

    host: str
    port: int
    secret: str = field(repr=False)


class Replica(Protocol):
    """What stands behind a channel; a `ConnectionError` of any of these hangs up."""

    async def submit(self, request: GenerationRequest) -> QueueFull | Draining | None: ...

    async def cancel(self, request: str) -> None: ...

    def messages(self, ingress: str) -> AsyncGenerator[StepMessage, None]: ...


class Channel:
    """Says to each ingress that connects what the replica's `messages` have for it, until these end or the ingress
    leaves, and answers each thing that it asks, in order. All on one event loop."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._secret = token_hex()
        self._server: asyncio.Server | None = None

    async def open(self, host: str) -> Address:
        """Listen at a free port of `host`, once, for as long as the process lives. Raises OSError."""
        self._server = await asyncio.start_server(self._meet, host, 0)
        return Address(host, self._server.sockets[0].getsockname()[1], self._secret)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_ASK_S):
                secret, _, ingress = (await reader.readline()).decode().rstrip("\n").partition(" ")
            if not compare_digest(secret.encode(), self._secret.encode()):
                return
            tasks = {
                asyncio.ensure_future(self._say(ingress, writer)),
                asyncio.ensure_future(self._answer(ingress, reader, writer)),
            }
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        except (OSError, TimeoutError, ValueError):  # it says too much, too little or nothing
            pass
        finally:
            writer.close()

    async def _say(self, ingress: str, writer: asyncio.StreamWriter) -> None:
        async with aclosing(self._replica.messages(ingress)) as messages:
            async for message in messages:
                writer.write(wire.framed(wire.telling(message)))
                await writer.drain()
        writer.write(END)
        await writer.drain()

    async def _answer(self, ingress: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while said := await wire.frame(reader):
            writer.write(wire.framed(wire.answering(await self._answered(ingress, said))))
            await writer.drain()

    async def _answered(self, ingress: str, said: bytes) -> Answer:
        try:
            question = wire.asked(said)
            if isinstance(question, str):
                await self._replica.cancel(question)
                return None
            if question.ingress != ingress:
                raise ValueError(f"ingress: {question.ingress!r} asks at the connection of {ingress!r}")
            return await self._replica.submit(question)
        except ConnectionError:
            raise
        except Exception as error:
            return RuntimeError(f"{type(error).__name__}: {error}")


class Connection:
    """The ingress's end. What it asks is answered while somebody reads its `messages`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._asked: deque[asyncio.Future[Answer]] = deque()  # in the order of the answers

    async def submit(self, request: GenerationRequest) -> QueueFull | Draining | None:
        """Raises ConnectionError where the replica is gone, before its answer too, and RuntimeError where it failed
        over the request."""
        answer = await self._ask(request)
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    async def cancel(self, request: str) -> None:
        """Raises ConnectionError."""
        await self._ask(request)

    async def messages(self) -> AsyncGenerator[StepMessage, None]:
        """To their end, once; leaving the loop hangs up. Raises OSError or EOFError where the replica goes before
        that."""
        try:
            while said := await wire.frame(self._reader):
                match wire.heard(said):
                    case StepMessage() as message:
                        yield message
                    case answer:
                        if not (asked := self._asked.popleft()).done():  # else whoever asked waits no more
                            asked.set_result(answer)
        except asyncio.IncompleteReadError:
            raise EOFError("it hung up before the end") from None
        finally:
            self._writer.close()
            for asked in self._asked:
                if not asked.done():
                    asked.set_exception(ConnectionError("it hung up before its answer"))

    async def _ask(self, question: Question) -> Answer:
        said = wire.framed(wire.asking(question))
        if self._writer.is_closing():
            raise ConnectionError("it has hung up")
        self._writer.write(said)
        asked: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        await self._writer.drain()
        return await asked


async def connected(address: Address, ingress: str) -> Connection:
    """`ingress` with the replica at `address`, whose `messages` are to be read now. Raises OSError."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(f"{address.secret} {ingress}\n".encode())
    return Connection(reader, writer)
