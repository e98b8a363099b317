"""Bodies that do not end, and tenants that keep every thread busy: nobody else waits for them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import httpx
import pytest

from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Key, Prefix, R, Versioned
from tests.serving.http.conftest import LIMITS, Service, refusal, upload

pytestmark = pytest.mark.anyio
SLOW = 1_050
WAIT_S = 1.0  # for a place
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


async def unending(
    service: Service,
    tenant: str,
    path: str = "/v1/chat/completions",
    first: bytes = b"--b\r\n",
    stands: asyncio.Event | None = None,
) -> int:
    """The status of a request whose body begins and never goes on, from when it `stands`."""
    key = f"Bearer {service.keys[tenant]}".encode()
    headers = [(b"authorization", key), (b"content-type", b"multipart/form-data; boundary=b")]
    named = {"path": path, "raw_path": path.encode(), "query_string": b""}
    scope = {"type": "http", "method": "POST", "headers": headers, **named}
    status: list[int] = []
    begun = [{"type": "http.request", "body": first, "more_body": True}]

    async def receive() -> Any:
        if begun:
            return begun.pop()
        if stands is not None:
            stands.set()
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        status.extend([message["status"]] if message["type"] == "http.response.start" else [])

    await service.transport.app(scope, receive, send)
    return status[0]


async def test_bodies_that_never_end_take_their_tenants_places_and_nobody_elses(
    service: Service, bob: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = ("/v1/chat/completions", "/v1/fine_tuning/jobs", "/v1/files", "/v1/grafts", "/v1/grafts/import")
    loop, slow = asyncio.get_running_loop(), list[asyncio.Task[int]]()
    began, skipped, computed = loop.time(), 0.0, list[float]()

    async def bob_is_answered() -> None:
        at = time.thread_time()
        async with asyncio.timeout(0.03):
            assert (await bob.get("/models")).status_code == 200
            assert (await bob.post("/chat/completions", json=CHAT)).status_code == 200
        computed.append(time.thread_time() - at)

    with monkeypatch.context() as patch:
        # The loop's clock hardly moves by itself, so that no body is late on a busy machine.
        patch.setattr(loop, "time", lambda: began + skipped + (time.monotonic() - began) / 1000)
        while len(slow) < SLOW:
            more = range(len(slow), len(slow) + 50)  # as fast as a network brings them
            slow += [asyncio.ensure_future(unending(service, "ann", paths[n % 5])) for n in more]
            await bob_is_answered()
        assert not any(task.done() for task in slow), "nobody had to wait until one of them was over"
        skipped += LIMITS.body_s  # those that got a place have had their time, and the next ones get theirs
        while sum(task.done() for task in slow) < LIMITS.bodies_per_tenant:
            await bob_is_answered()
        skipped += WAIT_S - LIMITS.body_s
        while sum(task.done() for task in slow) < SLOW - LIMITS.bodies_per_tenant:
            await bob_is_answered()
        # Those that got a place are told that they are too slow, the others that there is none.
        assert Counter(task.result() for task in slow if task.done()) == {
            408: LIMITS.bodies_per_tenant,
            429: SLOW - 2 * LIMITS.bodies_per_tenant,
        }
        skipped += LIMITS.body_s
        assert set(await asyncio.gather(*slow)) == {408, 429}
    assert max(computed) < 2.0, "what the loop itself computes for them holds nobody up"
    async with service.as_("ann") as ann:
        assert (await ann.post("/chat/completions", json=CHAT)).status_code == 200  # all places are free again


async def test_ten_thousand_bytes_buy_a_body_one_second_more(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, stands = asyncio.get_running_loop(), asyncio.Event()
    began, skipped = loop.time(), 0.0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "time", lambda: began + skipped + (time.monotonic() - began) / 1000)
        task = asyncio.ensure_future(unending(service, "ann", first=b" " * 10_000, stands=stands))
        await stands.wait()
        skipped += LIMITS.body_s + 0.5
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
        skipped += 0.6
        assert await task == 408


async def test_a_body_that_comes_slowly_but_comes_is_read(service: Service) -> None:
    content = b"".join(b"%d," % n for n in range(3_000))

    async def pieces() -> Any:
        for start in range(0, len(content), 1_000):
            await asyncio.sleep(0.05)
            yield content[start : start + 1_000]

    async with service.as_("ann") as ann:
        answer = await ann.post("/chat/completions", content=pieces())
    assert refusal(answer, 400)["code"] == "invalid_json"


async def test_a_tenant_whose_requests_fill_every_thread_holds_up_nobody_else(
    service: Service, monkeypatch: pytest.MonkeyPatch, ann: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    file = await upload(ann)
    scan, wait = service.api.store.scan, asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(prefix: Prefix[R], *, after: Key[R] | None = None, limit: int | None = None) -> list[Versioned[R]]:
        if prefix == keys.FILES:  # a page of ann's files takes as long as she likes
            asyncio.run_coroutine_threadsafe(wait.wait(), loop).result(30)
        return scan(prefix, after=after, limit=limit)

    monkeypatch.setattr(service.api.store, "scan", slow)
    asked = [asyncio.ensure_future(ann.get("/files")) for _ in range(60)]
    await asyncio.sleep(0.1)
    async with asyncio.timeout(2):
        refusal(await bob.get(f"/files/{file}"), 404)
        assert (await bob.get("/fine_tuning/jobs")).status_code == 200
    wait.set()
    assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}
