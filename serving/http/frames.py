"""Server-sent events of a streamed chat completion: role, text, the reason it ends, usage if asked, `[DONE]`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from polygraft.serving.http import errors
from polygraft.serving.http.errors import ApiError
from polygraft.serving.http.schemas import Usage

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """One answer's chunks; with `usage` every chunk carries the field, null but in the last."""

    id: str
    created: int
    model: str
    fingerprint: str
    with_usage: bool

    def role(self) -> str:
        return self._choice({"role": "assistant", "content": ""}, None)

    def text(self, piece: str) -> str:
        return self._choice({"content": piece}, None)

    def end(self, finish_reason: str) -> str:
        return self._choice({}, finish_reason)

    def usage(self, usage: Usage) -> str:
        return self._frame([], usage)

    def _choice(self, delta: dict[str, str], finish_reason: str | None) -> str:
        return self._frame([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}], None)

    def _frame(self, choices: list[dict[str, object]], usage: Usage | None) -> str:
        chunk: dict[str, object] = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }
        if self.with_usage:
            chunk["usage"] = usage.model_dump() if usage else None
        return _event(chunk)


def failure(error: ApiError) -> str:
    """The frame of an error after the status line is gone; the client raises it."""
    return _event(errors.body(error.message, status=error.status, param=error.param, code=error.code))


def _event(value: object) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
