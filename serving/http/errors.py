"""How a failure leaves the HTTP API: OpenAI's error object with the right status, and nothing of our insides."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Mapping, Sequence
from secrets import token_hex

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from polygraft.cluster.store.base import Conflict, StoreUnavailable, WriteRefused
from polygraft.cluster.validation import shown

_LOG = logging.getLogger(__name__)
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer other than success; `param` names the field of the request it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _encodable(message)
        self.param = None if param is None else _encodable(param)
        self.code = code
        self.headers = dict(headers or {})


def _encodable(text: str) -> str:
    """The text with half surrogate pairs, which a message may repeat from a request, written out."""
    return text.encode(errors="backslashreplace").decode()


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def not_found(kind: str, name: str, *, param: str | None = "id") -> ApiError:
    """The same answer for what does not exist and for what is another tenant's."""
    return ApiError(
        404, f"{kind} {shown(name)} does not exist", param=param, code=f"{kind.replace(' ', '_')}_not_found"
    )


def unavailable(message: str, retry_after_s: int = 2) -> ApiError:
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(retry_after_s)})


def internal(message: str, cause: Exception | str, *, code: str) -> ApiError:
    """A 500 that tells the client an id and nothing else of the cause, which is in the log under that id: it may name
    other tenants' requests, files of the server or secrets."""
    reference = f"err-{token_hex(8)}"
    _LOG.error("%s: %s: %s", reference, message, cause, exc_info=cause if isinstance(cause, Exception) else None)
    return ApiError(500, f"{message}; the server's log says why under {reference}", code=code)


def artefacts_full() -> ApiError:
    return unavailable("the artefact folder is full; nothing was kept, free some space and try again", 30)


def body(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": _TYPES.get(status, _family(status)), "param": param, "code": code}}


def answer(error: ApiError) -> JSONResponse:
    content = body(error.message, status=error.status, param=error.param, code=error.code)
    return JSONResponse(content, error.status, headers=error.headers)


def as_api_error(error: Exception) -> ApiError:
    """The answer for any exception of a request; an unforeseen one is logged and becomes a 500 with an id."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid(error.errors())
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case WriteRefused():
            return unavailable("the state store has no room to write; nothing was changed, try again later", 30)
        case StoreUnavailable():
            return unavailable("the state store is down; nothing was changed, try again")
        case Conflict():
            return ApiError(409, "it was changed by another request meanwhile; look again", code="conflict")
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return artefacts_full()
        case _:
            return internal("internal error", error, code="internal_error")


def install(app: FastAPI) -> None:
    """Make `app` answer every failure through `as_api_error`."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        found = as_api_error(error)
        if found.status == 405:  # the router only knows the methods of the first route that has the path
            found.headers |= {"Allow": ", ".join(sorted(allowed))} if (allowed := _methods(app, request)) else {}
        return answer(found)

    for kind in (ApiError, RequestValidationError, HTTPException, StoreUnavailable, Conflict, OSError, Exception):
        app.add_exception_handler(kind, handle)


def _methods(app: FastAPI, request: Request) -> set[str]:
    """What the request's path can be asked."""
    paths = app.openapi()["paths"]
    found = {path for path in paths if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path)), request.url.path)}
    exact = found & {request.url.path} or found
    return {method.upper() for path in exact for method in paths[path]}


def _family(status: int) -> str:
    return "invalid_request_error" if status < 500 else "server_error"


def _invalid(problems: Sequence[Mapping[str, object]]) -> ApiError:
    """A query or path parameter that FastAPI refused; bodies are read in body.py."""
    first = problems[0]
    location = first["loc"]
    assert isinstance(location, tuple | list)
    param = ".".join(str(part) for part in location[1:])
    return bad_request(f"{param}: {first['msg']} (got {shown(first['input'])})", param=param, code="invalid_value")
