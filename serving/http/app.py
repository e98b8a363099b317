"""The HTTP API as one FastAPI application over an `Api`; it knows nothing of Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool

from polygraft.serving.http import (
    adapters,
    backbones,
    chat,
    classify,
    cluster,
    completions,
    documents,
    dry_runs,
    errors,
    files,
    grafts,
    jobs,
    metrics,
    models,
    searches,
    tokens,
)
from polygraft.serving.http.answered import Answered
from polygraft.serving.http.auth import OPEN_PATHS, Authenticated
from polygraft.serving.http.bodies import BoundedBodies
from polygraft.serving.http.context import Api
from polygraft.serving.http.documents import Document, answers
from polygraft.serving.http.errors import unavailable
from polygraft.serving.http.schemas import Health

_UNHEALTHY: dict[int | str, Document] = {status: answers()[status] for status in (500, 503)}


def create_app(
    api: Api, answering: Callable[[FastAPI], AbstractAsyncContextManager[None]] = lambda _: nullcontext()
) -> FastAPI:
    """The application. Its lifespan follows the backbones that there are, and is `answering` meanwhile, which is for
    nothing where whoever runs the lifespan brings the requests, too."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await api.backbones.start()
        async with answering(app):
            yield
        await api.backbones.close()

    app = FastAPI(title="Polygraft", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.api = api
    app.add_middleware(BoundedBodies, limits=api.limits)
    app.add_middleware(Authenticated, store=api.store)  # around the one before
    app.add_middleware(Answered, meters=api.meters)  # around both
    errors.install(app)
    stored = (files, jobs, dry_runs, searches, models, backbones, grafts, adapters)
    # Each request is compared with one route after the other: what is asked most stands first.
    for part in (chat, completions, *stored, classify, tokens, metrics, cluster):
        app.include_router(part.router)
    for path in OPEN_PATHS:
        app.add_api_route(path, health, responses=_UNHEALTHY, openapi_extra={"security": []})
    documents.install(app)
    return app


async def health(request: Request) -> Health:
    """200 while the store answers and a replica of the default backbone is connected, unless nobody asks that one;
    else 503 naming what is missing."""
    api: Api = request.app.state.api
    await run_in_threadpool(api.store.ping)
    default = api.backbones.default
    if default is None or (api.backbones.wanted(default) and not default.gateway.ready()):
        raise unavailable("no serving replica is connected yet")
    return Health()
