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
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


async def unending(service: Service, tenant: str, path: str = "/v1/chat/completions", first: bytes = b"--b\r\n") -> int:
    """The status of a request whose body begins and never goes on."""
    key = f"Bearer {service.keys[tenant]}".encode()
    headers = [(b"authorization", key), (b"content-type", b"multipart/form-data; boundary=b")]
    named = {"path": path, "raw_path": path.encode(), "query_string": b""}
    scope = {"type": "http", "method": "POST", "headers": headers, **named}
    status: list[int] = []
    begun = [{"type": "http.request", "body": first, "more_body": True}]

    async def receive() -> Any:
        return begun.pop() if begun else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        status.extend([message["status"]] if message["type"] == "http.response.start" else [])

    await service.transport.app(scope, receive, send)
    return status[0]


async def test_bodies_that_never_end_take_their_tenants_places_and_nobody_elses(
    service: Service, bob: httpx.AsyncClient
) -> None:
    paths = ("/v1/chat/completions", "/v1/fine_tuning/jobs", "/v1/files", "/v1/grafts", "/v1/grafts/import")
    began = time.monotonic()
    slow: list[asyncio.Task[int]] = []
    waits = []
    while len(slow) < SLOW or not all(task.done() for task in slow):
        at = time.monotonic()
        more = range(len(slow), min(len(slow) + 50, SLOW))  # as fast as a network brings them
        slow += [asyncio.ensure_future(unending(service, "ann", paths[n % 5])) for n in more]
        assert (await bob.get("/models")).status_code == 200
        assert (await bob.post("/chat/completions", json=CHAT)).status_code == 200
        waits.append(time.monotonic() - at)
    assert max(waits) < 2.0 and len(waits) > 2
    # Those that got a place are told that they are too slow, the others that there is none.
    told = Counter(task.result() for task in slow)
    assert told.keys() == {408, 429} and told[408] >= LIMITS.bodies_per_tenant and told[429] > SLOW / 2
    assert time.monotonic() - began < LIMITS.body_s + 5
    async with service.as_("ann") as ann:
        assert (await ann.post("/chat/completions", json=CHAT)).status_code == 200  # all places are free again


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
