"""Counts answers by path of the API, method and status, for `/metrics`."""

from __future__ import annotations

from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polygraft.serving.http.meters import Meters

_NOWHERE = "other"  # whatever has no route: paths are the client's to make up
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


class Answered:
    """ASGI middleware, the outermost, so that refusals count, too."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self._app = app
        self._answers = meters.answers
        self._ingress = meters.ingress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def passed(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")  # what the router found, once it has looked
                handler = route.path if isinstance(route, Route) else _NOWHERE
                method = scope["method"] if scope["method"] in _METHODS else _NOWHERE
                self._answers.labels(self._ingress, method, handler, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, passed)
