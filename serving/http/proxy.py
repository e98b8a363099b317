"""What Serve's proxy, which stands before the API, answers while the API is not there: 503, as for anything that is
down. Its own answer is a 404, which a client takes for the API's word on what was asked for."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polygraft.serving.http.errors import answer, unavailable

RETRY_S = 5


class WhileStarting:
    """ASGI middleware of the proxy. A 404 of the API's is JSON, and goes through."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        absent = False

        async def passed(message: Message) -> None:
            nonlocal absent
            absent = absent or (message["type"] == "http.response.start" and _nobodys(message))
            if not absent:
                await send(message)

        await self._app(scope, receive, passed)
        if absent:
            await answer(unavailable("the service is starting; try again", RETRY_S))(scope, receive, send)


def middlewares() -> list[Middleware]:
    """For Serve's variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(WhileStarting)]


def _nobodys(start: Message) -> bool:
    kind = Headers(raw=start.get("headers", [])).get("content-type", "")
    return start["status"] == 404 and not kind.startswith("application/json")
