"""Server-sent events of a streamed answer: text as it comes, the reason it ends, usage if asked, `[DONE]`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

from polygraft.serving.http import errors
from polygraft.serving.http.errors import ApiError
from polygraft.serving.http.generations import Usage

_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once: a stream writes one a token
EVENTS = "text/event-stream"
# In the OpenAPI document, as OpenAPI 3.2 has it: what each event of the stream is. A `schema` beside it would be that
# of all its events, as an array.
STREAM = {
    EVENTS: {
        "itemSchema": {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]},
    }
}
DONE = "data: [DONE]\n\n"
Kind = Literal["chat.completion.chunk", "text_completion"]
# What stands around the text in a choice of each kind, and in place of both where there is none.
_AROUND = {
    "chat.completion.chunk": ('"delta":{"content":', "}", '"delta":{}'),
    "text_completion": ('"text":', "", '"text":""'),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """One answer's chunks; with `usage` every chunk carries the field, null but in the last. What all chunks share is
    written once, since a stream has one for every token."""

    kind: Kind
    id: str
    created: int
    model: str
    fingerprint: str
    with_usage: bool
    _head: str = field(init=False)
    _tail: str = field(init=False)

    def __post_init__(self) -> None:
        shared = {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        object.__setattr__(self, "_head", f'data: {_json(shared)[:-1]},"choices":[')
        object.__setattr__(self, "_tail", '],"usage":null}\n\n' if self.with_usage else "]}\n\n")

    def role(self) -> str:
        """How a chat begins."""
        return self._choice(0, '"delta":{"role":"assistant","content":""}', None)

    def said(self, piece: str, index: int = 0) -> str:
        """Nothing where a token made nothing certain."""
        if not piece:
            return ""
        before, after, _ = _AROUND[self.kind]
        return self._choice(index, f"{before}{_json(piece)}{after}", None)

    def end(self, finish_reason: str, index: int = 0) -> str:
        return self._choice(index, _AROUND[self.kind][2], finish_reason)

    def usage(self, usage: Usage) -> str:
        return f'{self._head}],"usage":{_json(usage.model_dump())}}}\n\n'

    def _choice(self, index: int, content: str, finish_reason: str | None) -> str:
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        return f'{self._head}{{"index":{index},{content},"logprobs":null,"finish_reason":{reason}}}{self._tail}'


def failure(error: ApiError) -> str:
    """The frame of an error after the status line is gone; the client raises it."""
    return f"data: {_json(errors.body(error.message, status=error.status, param=error.param, code=error.code))}\n\n"
