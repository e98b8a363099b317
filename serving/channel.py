"""What a replica says to an ingress, over a TCP connection that they have for it: a message is its length, then JSON.

An item of a Ray generator passes through five threads of two processes on its way, and there is one every step.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from hmac import compare_digest
from operator import attrgetter
from secrets import token_hex
from typing import Any

from polygraft.serving.messages import Load, StepMessage, StepTokens, Tally

_LENGTH = 4  # bytes; a message of none is the end
_ASK_S = 10.0  # for whoever connects to say who it is
_ASKED = 1024  # bytes that this may have
_tokens, _load, _tally = (attrgetter(*kind.__slots__) for kind in (StepTokens, Load, Tally))
_dumps = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Address:
    """Where a replica is listened to, by whoever knows its `secret`."""

    host: str
    port: int
    secret: str = field(repr=False)


class Channel:
    """Says to each ingress that connects what `messages` has for it, until that ends or the ingress leaves. All on one
    event loop."""

    def __init__(self, messages: Callable[[str], AsyncGenerator[StepMessage, None]]) -> None:
        self._messages = messages
        self._secret = token_hex()
        self._server: asyncio.Server | None = None

    async def open(self, host: str) -> Address:
        """Listen at a free port of `host`, once, for as long as the process lives. Raises OSError."""
        self._server = await asyncio.start_server(self._answer, host, 0, limit=_ASKED)
        return Address(host, self._server.sockets[0].getsockname()[1], self._secret)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_ASK_S):
                secret, _, ingress = (await reader.readline()).decode().rstrip("\n").partition(" ")
            if not compare_digest(secret.encode(), self._secret.encode()):
                return
            tasks = {asyncio.ensure_future(self._say(ingress, writer)), asyncio.ensure_future(reader.read())}
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
        async with aclosing(self._messages(ingress)) as messages:
            async for message in messages:
                said = packed(message)
                writer.write(len(said).to_bytes(_LENGTH) + said)
                await writer.drain()
        writer.write(bytes(_LENGTH))
        await writer.drain()


async def heard(address: Address, ingress: str) -> AsyncGenerator[StepMessage, None]:
    """What the replica at `address` says to `ingress`, to its end; leaving the loop hangs up. Raises OSError or
    EOFError where the replica goes before that."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(f"{address.secret} {ingress}\n".encode())
        while length := int.from_bytes(await reader.readexactly(_LENGTH)):
            yield unpacked(await reader.readexactly(length))
    except asyncio.IncompleteReadError:
        raise EOFError("it hung up before the end") from None
    finally:
        writer.close()


def packed(message: StepMessage) -> bytes:
    load = dict(zip(Load.__slots__, _load(message.load), strict=True)) | {"tally": _tally(message.load.tally)}
    return _dumps([[_tokens(one) for one in message.tokens], load, message.draining]).encode()


def unpacked(said: bytes) -> StepMessage:
    tokens, load, draining = json.loads(said)
    load |= {"resident": tuple(load["resident"]), "tally": Tally(*load["tally"])}
    return StepMessage(tuple(map(_told, tokens)), Load(**load), draining)


def _told(row: list[Any]) -> StepTokens:
    told = StepTokens(*row)
    return told if told.probabilities is None else replace(told, probabilities=tuple(told.probabilities))
