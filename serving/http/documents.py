"""The OpenAPI document: bodies that handlers read themselves, the key, and for each operation the statuses that it can
answer, in OpenAI's error object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from polygraft.serving.http.schemas import ErrorAnswer

_REF = "#/components/schemas/{model}"
_MEANINGS = {
    400: "The request cannot be carried out as it is; the message names the field and the value.",
    401: "The API key is missing, unknown or revoked.",
    403: "The key's tenant may not ask this.",
    404: "What is named does not exist, or is another tenant's.",
    408: "The body did not arrive in time.",
    409: "In the way: something is in use, or a key was used for another request.",
    413: "The body is too large.",
    429: "Too much of one tenant at a time; Retry-After says when to come back.",
    500: "A fault of the service; its log says more under the id in the message.",
    503: "A part of the service does not answer, or the artefact folder is full; Retry-After says when to come back.",
}
READING = (400, 408, 413, 429)  # what any request with a body can be answered
Document = dict[str, Any]


def answers(*statuses: int) -> dict[int | str, Document]:
    """For a route: the refusals it has beside those that every route has."""
    return {status: {"model": ErrorAnswer, "description": _MEANINGS[status]} for status in (401, *statuses, 500, 503)}


def json_body(model: type[BaseModel]) -> Document:
    """For a route that reads its JSON body by `body.py`."""
    schema = model.model_json_schema(ref_template=_REF)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def form_body(**fields: Document) -> Document:
    """For a route that reads a file and short fields by `upload.py`; those without a default are required."""
    properties = {"file": {"type": "string", "format": "binary"}, **fields}
    required = [name for name, field in properties.items() if "default" not in field]
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def install(app: FastAPI) -> None:
    """Make `app.openapi` give the document."""

    def openapi() -> Document:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> Document:
    found: Document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for operation in _operations(found):
        operation["responses"].pop("422", None)  # FastAPI's own; here it is a 400 (errors.py)
        for content in operation.get("requestBody", {}).get("content", {}).values():
            schemas |= content["schema"].pop("$defs", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    found["security"] = [{"key": []}]
    return found


def _operations(document: Mapping[str, Any]) -> Iterator[Document]:
    for path in document["paths"].values():
        yield from path.values()
