"""A JSON body: read within a limit, decoded, and checked against its model, in the tenant's turn at a thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel, JsonValue, ValidationError
from starlette.requests import Request

from polygraft.cluster.validation import explain
from polygraft.grafts.text.plain_json import JsonError, load
from polygraft.serving.http.context import Api
from polygraft.serving.http.errors import ApiError, bad_request

_LIMIT_BYTES = 4 << 20
M = TypeVar("M", bound=BaseModel)
R = TypeVar("R")


async def read_json(request: Request) -> JsonValue:
    """The decoded body. Raises ApiError 413 past 4 MiB, 400 for what is not JSON or cannot be written again."""
    return await _in_turn(request, _decoded, await _raw(request))


async def read_body(request: Request, model: type[M]) -> M:
    """The body as `model`. Raises ApiError 413 and 400, the latter naming the field, the value and the choices."""
    return await work_on(request, model, lambda body: body)


async def work_on(request: Request, model: type[M], function: Callable[[M], R]) -> R:
    """What `function` returns or raises for the body as `model`, called in the turn in which it is checked. Raises
    ApiError as `read_body` does."""
    return await _in_turn(request, lambda raw: function(_as(model, _decoded(raw))), await _raw(request))


async def _in_turn(request: Request, function: Callable[[bytearray], R], raw: bytearray) -> R:
    api: Api = request.app.state.api
    return await api.turns.work(request.state.tenant, function, raw)


async def _raw(request: Request) -> bytearray:
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > _LIMIT_BYTES:
            raise ApiError(413, f"the body is larger than {_LIMIT_BYTES} bytes", code="body_too_large")
    return raw


def _decoded(raw: bytearray) -> JsonValue:
    try:
        return load(raw)
    except JsonError as error:
        message = f"{error}" if error.path else f"body: {error}"
        raise bad_request(message, param=error.path or None, code="invalid_json") from None


def _as(model: type[M], body: JsonValue) -> M:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        path, message = explain(error, model)
        raise bad_request(message, param=path or None, code="invalid_value") from None
