"""A JSON body: read within a limit, decoded, and checked against its model."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, JsonValue, ValidationError
from starlette.requests import Request

from polygraft.cluster.validation import explain
from polygraft.grafts.text.plain_json import JsonError, load
from polygraft.serving.http.errors import ApiError, bad_request

_LIMIT_BYTES = 4 << 20
M = TypeVar("M", bound=BaseModel)


async def read_json(request: Request) -> JsonValue:
    """The decoded body. Raises ApiError 413 past 4 MiB, 400 for what is not JSON or cannot be written again."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > _LIMIT_BYTES:
            raise ApiError(413, f"the body is larger than {_LIMIT_BYTES} bytes", code="body_too_large")
    try:
        return load(raw)
    except JsonError as error:
        message = f"{error}" if error.path else f"body: {error}"
        raise bad_request(message, param=error.path or None, code="invalid_json") from None


def read_as(model: type[M], body: JsonValue) -> M:
    """`body` as `model`. Raises ApiError 400 that names the field, the value and the choices."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        path, message = explain(error, model)
        raise bad_request(message, param=path or None, code="invalid_value") from None
