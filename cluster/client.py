"""The HTTP API as the command line, the demo and searches use it: a thin, blocking client without torch and Ray.

Bodies of requests are OpenAI's (see `cluster/spec.py` for what a job may ask for); answers are those of
`cluster/answers.py`. A failed call raises `ApiFailure` with OpenAI's error object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, JsonValue, ValidationError

from polygraft.cluster.answers import (
    JobEvent,
    RemoteBackbone,
    RemoteDryRun,
    RemoteFile,
    RemoteGraft,
    RemoteJob,
    RemoteModel,
)
from polygraft.cluster.service import ServiceNotRunning, find_service, read_key

if TYPE_CHECKING:  # a search's trials, each a process, need neither
    from polygraft.cluster.settings import Settings
    from polygraft.cluster.view import ClusterView

_PAGE = 100
_RETRIES = 3
_IMPORT_S = 300.0  # a large graft has its turn after others, and takes a minute to read
_RETRIABLE = (429, 503)
M = TypeVar("M", bound=BaseModel)
R = TypeVar("R")
B = TypeVar("B", bound=Mapping[str, object] | None)


class _Page(BaseModel):
    data: list[dict[str, JsonValue]]
    has_more: bool = False


class ApiFailure(Exception):
    """The service refused or failed; the fields are those of OpenAI's error object."""

    def __init__(
        self, status: int, message: str, *, kind: str = "", param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code


class Client:
    """One tenant's view of a service. Safe to use from one thread at a time; close it, or use it as a context."""

    def __init__(
        self, url: str, key: str, *, transport: httpx.BaseTransport | None = None, timeout_s: float = 60.0
    ) -> None:
        """Raises ApiFailure for an address or a key that there cannot be."""
        if not key.isascii() or not key.isprintable():
            raise ApiFailure(0, "the API key has characters that no key has")
        self.url = url
        try:
            self._http = httpx.Client(
                base_url=f"{url}/v1",
                headers={"Authorization": f"Bearer {key}"},
                transport=transport,
                timeout=timeout_s,
                trust_env=False,
            )
        except httpx.InvalidURL as error:
            raise ApiFailure(0, f"{url!r} is no address of a service: {error}") from None

    @staticmethod
    def local(settings: Settings) -> Client:
        """The service that runs under the home folder, as its local tenant. Raises ServiceNotRunning."""
        return Client(find_service(settings.service_path).url, read_key(settings.api_key_path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def upload(self, file: Path | bytes, *, filename: str | None = None, purpose: str = "fine-tune") -> RemoteFile:
        """Send a JSONL file; it is checked before this returns."""
        if isinstance(file, bytes):
            return self._upload(filename or "data.jsonl", file, purpose)
        with file.open("rb") as content:
            return self._upload(filename or file.name, content, purpose)

    def create_job(self, body: Mapping[str, JsonValue], *, idempotency_key: str | None = None) -> RemoteJob:
        """Submit a job; with an idempotency key, submitting it again returns the first one."""
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self.ask(RemoteJob, "POST", "/fine_tuning/jobs", body=body, headers=headers)

    def dry_run(self, body: Mapping[str, JsonValue]) -> RemoteDryRun:
        """What `create_job` would make of the body; nothing is made."""
        return self.ask(RemoteDryRun, "POST", "/fine_tuning/dry_runs", body=body)

    def delete_file(self, file: str) -> None:
        self._send(self._http.build_request("DELETE", f"/files/{segment(file)}"))

    def job(self, job: str) -> RemoteJob:
        return self.ask(RemoteJob, "GET", f"/fine_tuning/jobs/{segment(job)}")

    def jobs(self, limit: int | None = None) -> Iterator[RemoteJob]:
        """The tenant's jobs, newest first."""
        return self.pages(RemoteJob, "/fine_tuning/jobs", limit=limit)

    def cancel(self, job: str) -> RemoteJob:
        return self.ask(RemoteJob, "POST", f"/fine_tuning/jobs/{segment(job)}/cancel")

    def renew(self, job: str, lease_s: float) -> RemoteJob:
        """Say for the job's owner that it is still wanted, for `lease_s` seconds more."""
        return self.ask(RemoteJob, "POST", f"/fine_tuning/jobs/{segment(job)}/renew", body={"lease_s": lease_s})

    def events(self, job: str, *, limit: int | None = None) -> Iterator[JobEvent]:
        """The job's events and metrics, newest first."""
        return self.pages(JobEvent, f"/fine_tuning/jobs/{segment(job)}/events", limit=limit)

    def models(self) -> list[RemoteModel]:
        return list(self.pages(RemoteModel, "/models"))

    def backbones(self) -> list[RemoteBackbone]:
        return list(self.pages(RemoteBackbone, "/backbones"))

    def add_backbone(self, name: str, path: str, *, dtype: str, quantise: str | None) -> RemoteBackbone:
        """Add a model by its folder or name; it is read and checked before this returns."""
        body = {"name": name, "path": path, "dtype": dtype, "quantise": quantise}
        request = self._http.build_request("POST", "/backbones", json=body, timeout=_IMPORT_S)
        return self._read(RemoteBackbone, request)

    def remove_backbone(self, name: str) -> None:
        self._send(self._http.build_request("DELETE", f"/backbones/{segment(name)}"))

    def cluster(self) -> ClusterView:
        from polygraft.cluster.view import ClusterView

        return self.ask(ClusterView, "GET", "/cluster")

    def grafts(self) -> Iterator[RemoteGraft]:
        """The tenant's grafts by name and version."""
        return self.pages(RemoteGraft, "/grafts")

    def graft(self, graft: str) -> RemoteGraft:
        """A version, or the one that a name means."""
        return self.ask(RemoteGraft, "GET", f"/grafts/{segment(graft)}")

    def import_graft(
        self, archive: Path, name: str, *, promote: bool = False, backbone: str | None = None
    ) -> RemoteGraft:
        """Send a tar archive of a graft's folder, for a backbone or the service's own; it is read and checked before
        this returns."""
        fields = {"name": name, "promote": "true" if promote else "false", "backbone": backbone or ""}
        with archive.open("rb") as content:
            files = {"file": (archive.name, content)}
            request = self._http.build_request("POST", "/grafts", files=files, data=fields, timeout=_IMPORT_S)
            return self._read(RemoteGraft, request)

    def export_graft(self, graft: str, target: Path) -> None:
        """Write a tar archive of the graft's files."""
        path = f"/grafts/{segment(graft)}/export"
        with _reached(self.url), self._http.stream("GET", path) as answer, target.open("xb") as out:
            if answer.is_error:
                answer.read()
                raise _failure(answer)
            for piece in answer.iter_bytes():
                out.write(piece)

    def promote_graft(self, graft: str) -> RemoteGraft:
        return self.ask(RemoteGraft, "POST", f"/grafts/{segment(graft)}/promote")

    def roll_back_graft(self, name: str) -> RemoteGraft:
        return self.ask(RemoteGraft, "POST", f"/grafts/{segment(name)}/rollback")

    def delete_graft(self, graft: str) -> None:
        self._send(self._http.build_request("DELETE", f"/grafts/{segment(graft)}"))

    def wait(
        self, job: str, on_progress: Callable[[RemoteJob], None] | None = None, *, period_s: float = 0.5
    ) -> RemoteJob:
        """The job once it is final, however it ended; `on_progress` sees it each time it is looked at."""
        while True:
            seen = self.job(job)
            if on_progress:
                on_progress(seen)
            if seen.final:
                return seen
            time.sleep(period_s)

    def chat(
        self, model: str, messages: Sequence[Mapping[str, str]], *, max_tokens: int, temperature: float | None = None
    ) -> Iterator[str]:
        """The answer's text, piece by piece as it is generated."""
        body = {
            "model": model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": True,
        }
        given = _finite({name: value for name, value in body.items() if value is not None})
        with _reached(self.url), self._http.stream("POST", "/chat/completions", json=given) as answer:
            if answer.is_error:
                answer.read()
                raise _failure(answer)
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield from _texts(answer.status_code, json.loads(line.removeprefix("data: ")))

    def _upload(self, filename: str, content: bytes | BinaryIO, purpose: str) -> RemoteFile:
        files = {"file": (filename, content)}
        request = self._http.build_request("POST", "/files", files=files, data={"purpose": purpose})
        return self._read(RemoteFile, request)

    def ask(
        self,
        kind: type[M],
        method: str,
        path: str,
        *,
        body: Mapping[str, JsonValue] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> M:
        request = self._http.build_request(method, path, json=_finite(body), headers=dict(headers or {}))
        return self._read(kind, request)

    def pages(self, kind: type[M], path: str, *, limit: int | None = None) -> Iterator[M]:
        """Items of a list answer, page after page."""
        after: str | None = None
        left = limit
        while left is None or left > 0:
            parameters: dict[str, str | int] = {"limit": min(_PAGE, left or _PAGE)}
            if after:
                parameters["after"] = after
            page = self._read(_Page, self._http.build_request("GET", path, params=parameters))
            for item in page.data:
                yield self._understood(kind.model_validate, item)
            if not page.has_more or not page.data:
                return
            after = str(page.data[-1].get("id"))
            left = None if left is None else left - len(page.data)

    def _read(self, kind: type[M], request: httpx.Request) -> M:
        return self._understood(kind.model_validate_json, self._send(request).content)

    def _understood(self, read: Callable[[R], M], answer: R) -> M:
        try:
            return read(answer)
        except ValidationError as error:
            what = error.errors(include_url=False)[0]
            where = ".".join(map(str, what["loc"])) or "its answer"
            raise ApiFailure(
                0, f"{self.url} answers as no service of this version does: {where}: {what['msg']}"
            ) from None

    def _send(self, request: httpx.Request) -> httpx.Response:
        """The answer; asked again while the service says that it is busy or its store is down, when asking twice
        changes nothing."""
        repeatable = request.method == "GET" or "Idempotency-Key" in request.headers
        for attempt in range(_RETRIES + 1):
            with _reached(self.url):
                answer = self._http.send(request)
            if answer.status_code not in _RETRIABLE or not repeatable or attempt == _RETRIES:
                break
            time.sleep(_retry_after_s(answer, attempt))
        if not answer.is_success:  # a redirection, too: no service sends one that a client should follow
            raise _failure(answer)
        return answer


@contextmanager
def _reached(url: str) -> Iterator[None]:
    """Turns "nobody listens there" into ServiceNotRunning, and a connection that broke into ApiFailure."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout):
        raise ServiceNotRunning(f"nothing answers at {url}; start the service with: polygraft up") from None
    except httpx.TransportError as error:
        raise ApiFailure(0, f"{url} did not answer: {error or type(error).__name__}") from None


def _texts(status: int, chunk: Mapping[str, JsonValue]) -> Iterator[str]:
    """Text in one frame of a streamed answer; an error after the first token arrives as a frame too."""
    if isinstance(error := chunk.get("error"), dict):
        raise _described(status, error)
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        delta = choice.get("delta") if isinstance(choice, dict) else None
        content = delta.get("content") if isinstance(delta, dict) else None
        if isinstance(content, str):
            yield content


def _failure(answer: httpx.Response) -> ApiFailure:
    try:
        body = answer.json()
        error = body["error"]
        assert isinstance(error, dict)
    except (ValueError, KeyError, TypeError, AssertionError):
        return ApiFailure(answer.status_code, f"HTTP {answer.status_code}: {answer.text[:500]}")
    return _described(answer.status_code, error)


def _described(status: int, error: Mapping[str, JsonValue]) -> ApiFailure:
    def text(name: str) -> str | None:
        value = error.get(name)
        return None if value is None else str(value)

    return ApiFailure(
        status, text("message") or "no message", kind=text("type") or "", param=text("param"), code=text("code")
    )


def _retry_after_s(answer: httpx.Response, attempt: int) -> float:
    told = answer.headers.get("Retry-After", "")
    return min(float(told), 10.0) if told.isdecimal() else 0.5 * 2.0**attempt


def _finite(body: B) -> B:
    """The body, which JSON can say. Raises ApiFailure."""
    try:
        json.dumps(body, allow_nan=False)
    except ValueError:
        raise ApiFailure(0, "the request holds a number that JSON has not: nan or infinity") from None
    return body


def segment(text: str) -> str:
    """An id as a part of a path. Raises ApiFailure for one that would be another path."""
    if text in ("", ".", ".."):
        raise ApiFailure(404, f"{text!r} does not exist")
    return quote(text, safe="@")
