"""Who is calling: the tenant of a bearer key, looked up before anything of the request is read."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from polygraft.cluster.api_keys import verify_key
from polygraft.cluster.model import TenantId
from polygraft.cluster.store.base import Store
from polygraft.serving.http.errors import ApiError, answer, as_api_error

OPEN_PATHS = ("/healthz", "/health")  # Kubernetes' habit and vLLM's


class Authenticated:
    """ASGI middleware: puts the caller's tenant into `request.state.tenant`, or answers 401 (503: store down)."""

    def __init__(self, app: ASGIApp, store: Store) -> None:
        self._app = app
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["tenant"] = await self._tenant(Headers(scope=scope).get("authorization", ""))
        except Exception as error:  # the routes' handlers stand behind this middleware
            await answer(as_api_error(error))(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _tenant(self, header: str) -> TenantId:
        scheme, _, key = header.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _refused("no API key; send it as 'Authorization: Bearer <key>'", "missing_api_key")
        found = await run_in_threadpool(verify_key, self._store, key.strip())
        if found is None:
            raise _refused("the API key is unknown or was revoked", "invalid_api_key")
        return found.tenant


def _refused(message: str, code: str) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})
