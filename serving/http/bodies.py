"""How many bodies of a tenant may be on their way at a time, and how long each may take.

A request whose body does not end holds memory, a connection and a place at the ingress until somebody gives it up. So
each tenant has places of its own: a body holds one from the first look at it until its end, a request that finds none
free waits a moment and is a 429, and a body slower than a slow line is a 408. Other tenants notice nothing.
"""

from __future__ import annotations

import asyncio
import gc
from collections import defaultdict

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polygraft.cluster.model import TenantId
from polygraft.cluster.settings import LimitSettings
from polygraft.grafts.runtime.process import give_back
from polygraft.serving.http.errors import ApiError

_WAIT_S = 1.0  # for a place: bodies that are there already give theirs back within milliseconds
_SLOWEST = 10_000  # bytes a second that a body may come at, after its first `body_s` seconds
_LARGE = 256 * 1024
_QUIET_S = 2.0
_CLOSE = {"Connection": "close"}  # what is still to come of the body will not be read


class BoundedBodies:
    """ASGI middleware behind the one that says who is calling."""

    def __init__(self, app: ASGIApp, limits: LimitSettings) -> None:
        self._app = app
        self._limits = limits
        self._places: defaultdict[TenantId, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(limits.bodies_per_tenant)
        )
        self._giving_back: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tenant: TenantId | None = scope.get("state", {}).get("tenant")
        if scope["type"] != "http" or tenant is None:
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._places[tenant], self._limits)
        try:
            await self._app(scope, body.receive, send)
        finally:
            body.end()
            if body.bytes > _LARGE:
                self._give_back_soon()

    def _give_back_soon(self) -> None:
        """Hand the memory that large bodies took back to the system: it hangs on errors that the collector has not
        looked at, and lies in as many heaps as threads have read bodies."""
        if self._giving_back is None:
            self._giving_back = asyncio.get_running_loop().call_later(_QUIET_S, self._give_back)

    def _give_back(self) -> None:
        self._giving_back = None
        asyncio.get_running_loop().run_in_executor(None, _collected)


def _collected() -> None:
    gc.collect()
    give_back()


class _Body:
    """One request's `receive`, which raises ApiError 429 and 408; after the body's end it is the server's own."""

    def __init__(self, receive: Receive, places: asyncio.Semaphore, limits: LimitSettings) -> None:
        self._receive = receive
        self._places = places
        self._limits = limits
        self.bytes = 0
        self._until: float | None = None
        self._ended = False

    async def receive(self) -> Message:
        if self._ended:
            return await self._receive()
        if self._until is None:
            await self._begin()
            self._until = asyncio.get_running_loop().time() + self._limits.body_s
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            self.end()
            raise ApiError(
                408, "the body did not arrive in time; send it again", code="body_too_slow", headers=_CLOSE
            ) from None
        self.bytes += len(message.get("body", b""))
        self._until += len(message.get("body", b"")) / _SLOWEST
        if not message.get("more_body", False):
            self.end()
        return message

    def end(self) -> None:
        """Give the place back, if there is one to give back."""
        if self._until is not None and not self._ended:
            self._places.release()
        self._ended = True

    async def _begin(self) -> None:
        try:
            async with asyncio.timeout(_WAIT_S):
                await self._places.acquire()
        except TimeoutError:
            message = f"{self._limits.bodies_per_tenant} of your requests have bodies that have not ended; end them"
            raise ApiError(429, message, code="too_many_bodies", headers={"Retry-After": "1", **_CLOSE}) from None
