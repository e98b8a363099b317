"""One message of a conversation: what of OpenAI's format is taken, and what it means, in training and in chat alike.

Null is absent: clients write out fields that they do not use, and data sets fill the fields of their other rows. A
developer is a system message by its newer name, text parts are one text, and a `name` changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

Role = Literal["system", "user", "assistant"]
_ROLES: Mapping[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "developer": "system"}

_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` is the loss weight of an assistant's tokens (0 or 1) and means nothing for the other roles."""

    role: Role
    content: str
    weight: int = 1

    @property
    def trained(self) -> bool:
        return self.role == "assistant" and self.weight > 0


class _Part(BaseModel):
    """A part of a body, in which null is absent."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value


_WANTED: Mapping[str, str] = {
    "role": f"one of {', '.join(_ROLES)}",
    "content": "a string or a list of text parts",
    "weight": "0 or 1",
    "name": "a string",
}


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ChatMessage(_Part):
    """A message of a chat; the fields that can only be null are what OpenAI's client echoes back from an answer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    annotations: Annotated[list[JsonValue] | None, Field(max_length=0)] = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def message(self) -> Message:
        return Message(_ROLES[self.role], self.text)


class TrainingMessage(ChatMessage):
    """A message of a training file."""

    weight: Annotated[int, Field(ge=0, le=1)] | None = None

    @property
    def message(self) -> Message:
        return Message(_ROLES[self.role], self.text, 1 if self.weight is None else self.weight)


class MessageError(ValueError):
    """A message that is refused; `path` leads from it to the field to blame, "" for all of it."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


def read_training_message(entry: object) -> Message:
    """Raises MessageError that names the field, the value and the choices."""
    if not isinstance(entry, dict):
        raise MessageError("", f"{shown(entry)} is not an object with 'role' and 'content'")
    called = any(entry.get(name) is not None for name in ("tool_calls", "function_call"))
    if called or entry.get("role") in ("tool", "function"):
        raise MessageError("", "tool calls and tool messages are not supported yet")
    try:
        read = TrainingMessage.model_validate(entry)
    except ValidationError as error:
        raise _explained(error, entry) from None
    message = read.message
    if not message.content.strip():
        raise MessageError("content", f"{shown(message.content)} is empty")
    if _HALF_PAIR.search(message.content):
        raise MessageError("content", "holds half of a surrogate pair, which is no character")
    if read.weight is not None and message.role != "assistant":
        raise MessageError("weight", f"{shown(read.weight)} on a {read.role} message; only the assistant's are trained")
    return message


def shown(value: object) -> str:
    """A value as JSON, short enough for an error message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _explained(error: ValidationError, entry: Mapping[str, object]) -> MessageError:
    """The first thing wrong; an unknown field outranks what it may have caused elsewhere."""
    errors = error.errors()
    unknown = [one for one in errors if one["type"] == "extra_forbidden"]
    in_parts = [one for one in errors if any(isinstance(step, int) for step in one["loc"])]
    first = (unknown or in_parts or errors)[0]
    if not first["loc"]:  # of no field: a key that pydantic cannot read
        return MessageError("", "a key holds half of a surrogate pair, which is no character")
    field, last = str(first["loc"][0]), first["loc"][-1]
    number = next((step for step in first["loc"] if isinstance(step, int)), None)
    path = field if number is None else f"{field}[{number}]" + ("" if isinstance(last, int) else f".{last[:60]}")
    if unknown:
        model = TrainingMessage if number is None else TextPart
        return MessageError(path[:120], f"unknown key; the known ones are {', '.join(sorted(model.model_fields))}")
    if number is not None:
        given = None if first["type"] == "missing" else first["input"]
        return MessageError(path, f"{shown(given)} is not of a text part, which has type 'text' and a text")
    wanted = _WANTED.get(field, "supported; leave it out")
    return MessageError(field, f"{shown(entry.get(field))} is not {wanted}")
