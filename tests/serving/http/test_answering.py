"""The socket that ingresses take turns at: who connects while none is there waits, and nobody is cut off by one that
goes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from polygraft.serving.http import connection
from polygraft.serving.http.answering import answering
from polygraft.serving.http.listener import Listener, handed

pytestmark = pytest.mark.anyio


def said(name: str, until: asyncio.Event) -> Starlette:
    """Answers with its name; at /long with its name, and with it again after `until`."""

    async def parts() -> AsyncGenerator[str, None]:
        yield name
        await until.wait()
        yield name

    async def short(_: Request) -> PlainTextResponse:
        return PlainTextResponse(name, headers={"Connection": "close"})

    async def long(_: Request) -> StreamingResponse:
        return StreamingResponse(parts())

    return Starlette(routes=[Route("/", short), Route("/long", long)])


@asynccontextmanager
async def listening(door: Path) -> AsyncIterator[tuple[httpx.AsyncClient, Listener]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    listener = Listener("127.0.0.1", port, door)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        yield client, listener
    listener.close()


async def test_who_connects_while_nobody_answers_is_answered_by_the_next_one(tmp_path: Path) -> None:
    async with listening(tmp_path / "door") as (client, _):
        for name in ("first", "second"):
            waiting = asyncio.create_task(client.get("/"))
            _, after = await asyncio.open_connection(client.base_url.host, client.base_url.port)  # nobody is refused
            after.close()
            assert not waiting.done()
            async with answering(said(name, asyncio.Event()), tmp_path / "door", drain_s=5):
                assert (await waiting).text == name


async def test_one_that_goes_ends_its_answers_while_another_takes_what_comes(tmp_path: Path) -> None:
    go, goes = asyncio.Event(), asyncio.Event()

    async def old() -> None:
        async with answering(said("old", go), tmp_path / "door", drain_s=20):
            await goes.wait()

    async with listening(tmp_path / "door") as (client, _):
        leaving = asyncio.create_task(old())
        async with client.stream("GET", "/long") as answer:
            pieces = answer.aiter_text()
            assert await anext(pieces) == "old"
            async with answering(said("new", go), tmp_path / "door", drain_s=5):
                goes.set()
                while (await client.get("/")).text != "new":  # both take turns until the old one has heard
                    pass
                assert {(await client.get("/")).text for _ in range(5)} == {"new"}
                assert not leaving.done()
                go.set()
                assert [piece async for piece in pieces] == ["old"]
        await leaving


async def test_an_answer_that_does_not_come_to_its_end_in_time_is_broken_off(tmp_path: Path) -> None:
    async with listening(tmp_path / "door") as (client, _), AsyncExitStack() as asking:
        async with answering(said("old", asyncio.Event()), tmp_path / "door", drain_s=0):
            answer = await asking.enter_async_context(client.stream("GET", "/long"))
            pieces = answer.aiter_text()
            assert await anext(pieces) == "old"
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(pieces)


async def test_a_door_that_somebody_left_who_was_killed_is_another_s(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "door"))
    next_ = said("next", asyncio.Event())
    async with listening(tmp_path / "door") as (client, _), answering(next_, tmp_path / "door", drain_s=5):
        assert (await client.get("/")).text == "next"


async def test_an_address_that_another_program_listens_at_is_refused(tmp_path: Path) -> None:
    async with listening(tmp_path / "door") as (client, listener):
        assert client.base_url.port
        with pytest.raises(OSError, match="in use"):
            Listener("127.0.0.1", client.base_url.port, tmp_path / "other")
        listener.close()
        with pytest.raises(ConnectionError):
            handed(tmp_path / "door")


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def served(tmp_path: Path, until: asyncio.Event) -> AsyncIterator[Callable[[bytes], Awaitable[Stream]]]:
    """Connections that have sent the bytes."""
    writers = list[asyncio.StreamWriter]()
    async with (
        listening(tmp_path / "door") as (client, _),
        answering(said("name", until), tmp_path / "door", drain_s=5),
    ):

        async def sent(data: bytes) -> Stream:
            reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
            writers.append(writer)
            writer.write(data)
            return reader, writer

        yield sent
        for writer in writers:
            writer.close()


CHUNKED = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_a_head_is_not_held_beyond_its_bound_whoever_sends_it(tmp_path: Path) -> None:
    much = b"a" * (4 * connection.HEAD_BYTES)
    async with served(tmp_path, asyncio.Event()) as sent:
        for head in (b"GET /" + much, b"GET / HTTP/1.1\r\nHost: x\r\nX-Y: " + much, b"\r\n" * len(much)):
            assert (await (await sent(head))[0].read()).startswith(b"HTTP/1.1 431 ")
        answer, more = await sent(CHUNKED)
        await answer.readuntil(b"Not Found")
        more.write(b"1\r\na\r\n0\r\nX-Y: " + much)
        with suppress(ConnectionError):
            assert await answer.read() == b""


async def test_what_does_not_come_to_its_end_is_closed_and_an_answer_underway_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    until = asyncio.Event()
    async with served(tmp_path, until) as sent:
        long, _ = await sent(b"GET /long HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await long.readuntil(b"name")
        monkeypatch.setattr(connection, "HEAD_S", 0.1)
        assert await (await sent(b""))[0].read() == b""
        assert await (await sent(b"GET / HTTP/1.1\r\nHos"))[0].read() == b""
        while not (await (await sent(CHUNKED + b"1\r\na\r\n"))[0].read()).startswith(b"HTTP/1.1 404 "):
            pass  # a busy machine was late with the head
        until.set()
        assert (await long.read()).endswith(b"name\r\n0\r\n\r\n")


async def test_an_answer_that_nobody_takes_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TAKE_S", 0.1)
    given_up = asyncio.Event()

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield bytes(1 << 16)
                await asyncio.sleep(0)
        finally:
            given_up.set()

    async def much(_: Request) -> StreamingResponse:
        return StreamingResponse(endless())

    app = Starlette(routes=[Route("/", much)])
    async with listening(tmp_path / "door") as (client, _), answering(app, tmp_path / "door", drain_s=5):
        _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port, limit=1)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(given_up.wait(), 30)
        writer.close()
