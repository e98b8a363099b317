"""A JSON body: read within a limit, decoded, and checked against its model."""

from __future__ import annotations

import json
from typing import TypeVar

from pydantic import BaseModel, JsonValue, ValidationError
from starlette.requests import Request

from polygraft.cluster.validation import explain
from polygraft.serving.http.errors import ApiError, bad_request

_LIMIT_BYTES = 4 << 20
M = TypeVar("M", bound=BaseModel)


async def read_json(request: Request) -> JsonValue:
    """The decoded body. Raises ApiError 413 past 4 MiB, 400 for what is not JSON or no text at all."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > _LIMIT_BYTES:
            raise ApiError(413, f"the body is larger than {_LIMIT_BYTES} bytes", code="body_too_large")
    try:
        value: JsonValue = json.loads(raw, parse_constant=_no_constant)
        half = _half(value)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    if half is not None:
        path = ".".join(half)
        message = f"{path or 'body'}: holds half of a surrogate pair, which is no character"
        raise bad_request(message, param=path or None, code="invalid_value")
    return value


def read_as(model: type[M], body: JsonValue) -> M:
    """`body` as `model`. Raises ApiError 400 that names the field, the value and the choices."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        path, message = explain(error, model)
        raise bad_request(message, param=path or None, code="invalid_value") from None


def _half(value: JsonValue) -> tuple[str, ...] | None:
    """Path of the first text, or of the object with the first key, that UTF-8 has no bytes for."""
    if isinstance(value, str):
        return None if value.isascii() or value.encode(errors="ignore").decode() == value else ()
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(key, str) and _half(key) is not None:
            return ()
        if (found := _half(one)) is not None:
            return (str(key), *found)
    return None


def _no_constant(name: str) -> JsonValue:
    raise ValueError(f"{name} is not a JSON value")
