"""A client's connection to the ingress, which nobody holds for nothing. Its bounds hold for everybody, since what comes
before a body comes before anybody has looked at a key: how large a head may be and how long it may take, how long the
rest of a body is still taken that was answered before its end, and how long an answer waits for its reader.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from polygraft.serving.http.errors import ApiError, answer

HEAD_BYTES = 64 * 1024  # of a head, or of what follows a body; what the system read at once with its end comes on top
HEAD_S = 30.0
TAKE_S = 120.0  # in which a client reads what lies in the connection's buffer, some 64 KiB


class Connection(HttpToolsProtocol):
    """uvicorn's, which waits for a head, holds one, and waits for a reader without bounds."""

    _late: asyncio.TimerHandle | None = None
    _untaken: asyncio.TimerHandle | None = None
    _held = 0  # bytes since the parser last came to an end: of a head, a piece of a body or a message
    _moved = False
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expected()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._moved = False
        super().data_received(data)
        self._held = 0 if self._moved else self._held + len(data)
        if self.transport.is_closing():
            return
        if self._held > HEAD_BYTES:
            self._refuse()
        elif not self._answering:
            self._expect()

    def on_headers_complete(self) -> None:
        self._moved = True
        self._expected()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._moved = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._answering and self._in_body and not self.transport.is_closing():
            self._expect()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._untaken = self._untaken or self.loop.call_later(TAKE_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._untaken is not None:
            self._untaken.cancel()
            self._untaken = None
        super().resume_writing()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _in_body(self) -> bool:
        return self.cycle is not None and self.cycle.more_body

    def _expect(self) -> None:
        """A head, or the end of a body that nobody reads: in a while, from the first time it is expected."""
        self._late = self._late or self.loop.call_later(HEAD_S, self.transport.close)

    def _expected(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self) -> None:
        """Say why, and take what still comes as long as a head may: an end at once would end what was said, too."""
        if self._answering or self._in_body:  # what is too large follows a body, or is the next request's
            self.transport.close()
            return
        self._refused = True
        self.transport.write(_REFUSAL)
        self.transport.write_eof()
        self._expect()


def _refusal(error: ApiError) -> bytes:
    """The answer of a connection that ends with it."""
    said = answer(error)
    headers = [*said.raw_headers, (b"connection", b"close")]
    lines = [b"HTTP/1.1 %d Request Header Fields Too Large" % error.status, *(b"%s: %s" % one for one in headers)]
    return b"\r\n".join([*lines, b"", bytes(said.body)])


_REFUSAL = _refusal(ApiError(431, f"the head of the request is larger than {HEAD_BYTES} bytes", code="head_too_large"))
