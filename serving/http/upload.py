"""A multipart upload as it streams in: written to a temporary file, hashed and counted, never held in memory."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from polygraft.cluster.validation import shown
from polygraft.serving.http.errors import ApiError, bad_request

_FIELD_LIMIT = 1024
_FORM_BYTES = 64 * 1024  # what a form may hold besides its file
_FIELDS = ("file", "purpose")


@dataclass(frozen=True, slots=True)
class Upload:
    """What arrived: the file's bytes lie at `path` until someone moves or deletes them."""

    path: Path
    filename: str
    fields: dict[str, str]
    bytes: int
    digest: str


async def receive(request: Request, *, folder: Path, limit_bytes: int) -> Upload:
    """Stream the request's one file part into `folder`; on any failure nothing stays there.

    Raises ApiError 400 for a body that is not a whole form with a file, 413 past `limit_bytes`.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise bad_request("Content-Type: expected multipart/form-data with a file and a purpose", param="file")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit_bytes + _FORM_BYTES:
        raise _too_large(limit_bytes)
    await run_in_threadpool(folder.mkdir, parents=True, exist_ok=True)
    path = folder / uuid4().hex
    form = _Form(path, limit_bytes)
    try:
        parser = form.parser(boundary)
        left = limit_bytes + _FORM_BYTES
        async for chunk in request.stream():
            left -= len(chunk)
            if left < 0:
                raise _too_large(limit_bytes)
            await run_in_threadpool(parser.write, chunk)
        parser.finalize()
        return form.upload()
    except FormParserError as error:
        form.discard()
        raise bad_request(f"the multipart body is malformed: {error}", param="file") from None
    except BaseException:  # a client that hangs up cancels this task: its half of a file goes too
        form.discard()
        raise


class _Form:
    """Callbacks of the parser: the part called `file` goes to disk, short fields to a dict."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._limit = limit_bytes
        self._digest = sha256()
        self._bytes = 0
        self._out: BinaryIO | None = None
        self._filename: str | None = None
        self._fields: dict[str, bytes] = {}
        self._name = ""
        self._header = b""
        self._headers: dict[bytes, bytes] = {}
        self._ended = False

    def parser(self, boundary: bytes) -> MultipartParser:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_end": self._end,
            },
        )

    def upload(self) -> Upload:
        if not self._ended:
            raise bad_request("body: ends before the form's closing boundary; send all of it", param="file")
        if self._out is None or self._filename is None:
            raise bad_request("file: required, but missing", param="file", code="missing_required_parameter")
        self._out.flush()
        os.fsync(self._out.fileno())
        self._out.close()
        fields = {name: value.decode("utf-8", "replace") for name, value in self._fields.items()}
        return Upload(self._path, self._filename, fields, self._bytes, self._digest.hexdigest())

    def discard(self) -> None:
        if self._out is not None:
            with suppress(OSError):  # what it still had to write finds no room either
                self._out.close()
            self._path.unlink(missing_ok=True)

    def _end(self) -> None:
        self._ended = True

    def _part_begin(self) -> None:
        self._headers = {}

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        key = self._header.lower()
        self._headers[key] = self._headers.get(key, b"") + data[start:end]

    def _header_end(self) -> None:
        self._header = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name not in _FIELDS:
            name = shown(self._name)
            raise bad_request(f"{name}: unknown field; choices: {', '.join(_FIELDS)}", param=self._name)
        if self._name != "file":
            self._fields[self._name] = b""
            return
        if self._out is not None:
            raise bad_request("file: given twice; upload one file at a time", param="file")
        # Only the last part of the name is kept, and it is only shown: blobs are stored under their id.
        self._filename = (
            options.get(b"filename", b"").decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
            or "upload.jsonl"
        )
        self._out = self._path.open("xb")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        part = data[start:end]
        if self._name != "file":
            self._fields[self._name] += part
            if len(self._fields[self._name]) > _FIELD_LIMIT:
                raise bad_request(f"{shown(self._name)}: longer than {_FIELD_LIMIT} bytes", param=self._name)
            return
        assert self._out is not None
        self._bytes += len(part)
        if self._bytes > self._limit:
            raise _too_large(self._limit)
        self._digest.update(part)
        self._out.write(part)


def _too_large(limit_bytes: int) -> ApiError:
    return ApiError(
        413, f"file: larger than the limit of {limit_bytes} bytes; split it", param="file", code="file_too_large"
    )
