"""The application as an HTTP server in the process of the ingress, on the loop that makes the tokens: what an engine
said goes to a client's socket without another process in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from math import ceil
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from polygraft.serving.http.connection import Connection
from polygraft.serving.http.listener import BACKLOG, handed

_KEPT_S = 90  # a connection on which nothing is asked; as behind Serve's proxies
_STARTING_S = 0.01


@asynccontextmanager
async def answering(app: ASGIApp, door: Path, *, drain_s: float) -> AsyncIterator[None]:
    """Answer meanwhile whoever connects to the listener at `door`. At the end nobody more is taken, and what is
    underway has `drain_s` to come to its end. Raises OSError where there is no listener."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",  # it is running
        access_log=False,
        log_config=None,
        log_level="error",  # anybody who sends what is no HTTP would write a line
        backlog=BACKLOG,
        timeout_keep_alive=_KEPT_S,
        timeout_graceful_shutdown=ceil(drain_s),
    )
    server = _Server(config)
    running = asyncio.create_task(server.serve([handed(door)]))
    while not (server.started or running.done()):
        await asyncio.sleep(_STARTING_S)
    try:
        if running.done():
            await running
        yield
    finally:
        server.should_exit = True
        await running


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """They are for Ray, whose process this is."""
        yield
