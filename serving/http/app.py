"""The HTTP API as one FastAPI application over an `Api`; it knows nothing of Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from polygraft.serving.http import chat, dry_runs, errors, files, jobs, models
from polygraft.serving.http.auth import Authenticated
from polygraft.serving.http.context import Api
from polygraft.serving.http.errors import unavailable


def create_app(api: Api) -> FastAPI:
    """The application; its lifespan starts and closes the gateway."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await api.gateway.start()
        yield
        await api.gateway.close()

    app = FastAPI(title="Polygraft", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.api = api
    app.add_middleware(Authenticated, store=api.store)
    errors.install(app)
    for part in (files, jobs, dry_runs, models, chat):
        app.include_router(part.router)
    app.add_api_route("/healthz", healthz)
    return app


async def healthz(request: Request) -> JSONResponse:
    """200 while the store answers and a replica is connected, else 503 naming what is missing."""
    api: Api = request.app.state.api
    await run_in_threadpool(api.store.ping)
    if not api.gateway.ready():
        raise unavailable("no serving replica is connected yet")
    return JSONResponse({"status": "ok"})
