"""What stands before the API: a service that is starting is down, and not without what was asked for."""

from __future__ import annotations

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from polygraft.serving.http.proxy import middlewares
from tests.serving.http.conftest import refusal

pytestmark = pytest.mark.anyio


async def serve_s_own(_: Request) -> PlainTextResponse:
    return PlainTextResponse("Path '/v1/models' not found. Ping http://.../-/routes for available routes.", 404)


async def the_api_s(_: Request) -> JSONResponse:
    return JSONResponse({"error": {"message": "model x does not exist"}}, 404)


async def stream(_: Request) -> StreamingResponse:
    return StreamingResponse(iter(["one ", "two"]), media_type="text/event-stream")


async def test_a_path_that_nobody_serves_yet_is_503_and_the_api_s_own_answers_go_through() -> None:
    routes = [Route("/absent", serve_s_own), Route("/none", the_api_s), Route("/stream", stream)]
    transport = httpx.ASGITransport(Starlette(routes=routes, middleware=middlewares()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        absent = await client.get("/absent")
        assert "starting" in refusal(absent, 503)["message"] and int(absent.headers["retry-after"]) > 0
        assert (await client.get("/none")).json() == {"error": {"message": "model x does not exist"}}
        assert (await client.get("/stream")).text == "one two"
