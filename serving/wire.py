"""What goes over the connection of a replica and an ingress: frames, each its length and then JSON. What an ingress
asks is a request, of which the replica checks every field, or the id of one to cancel."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from operator import attrgetter
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from polygraft.serving.messages import Draining, Load, QueueFull, StepMessage, StepTokens, Tally
from polygraft.serving.request import GenerationRequest

_LENGTH = 4  # bytes; a frame of none is the end
_MOST = 1 << 24  # bytes of a frame: a prompt of two million tokens
_tokens, _load, _tally = (attrgetter(*kind.__slots__) for kind in (StepTokens, Load, Tally))
_dumps = json.JSONEncoder(separators=(",", ":")).encode
_question: TypeAdapter[GenerationRequest | str] = TypeAdapter(
    GenerationRequest | str, config=ConfigDict(strict=True, extra="forbid")
)

Question = GenerationRequest | str
Answer = QueueFull | Draining | RuntimeError | None  # None: it is done; RuntimeError: the replica's code raised over it
END = bytes(_LENGTH)


def framed(said: bytes) -> bytes:
    """Raises RuntimeError for what is too large."""
    if len(said) > _MOST:
        raise RuntimeError(f"{len(said)} bytes are more than the {_MOST} of a frame")
    return len(said).to_bytes(_LENGTH) + said


async def frame(reader: asyncio.StreamReader) -> bytes:
    """The next one; empty at the end. Raises EOFError where it breaks off, ValueError where it is too large."""
    length = int.from_bytes(await reader.readexactly(_LENGTH))
    if length > _MOST:
        raise ValueError(f"a frame of {length} bytes is too large")
    return await reader.readexactly(length)


def asking(question: Question) -> bytes:
    return _question.dump_json(question)


def asked(said: bytes) -> Question:
    """Raises ValueError that names the field."""
    return _question.validate_json(said)


def answering(answer: Answer) -> bytes:
    match answer:
        case None:
            told: tuple[str, float | str | None] = ("done", None)
        case QueueFull(seconds):
            told = "full", seconds
        case Draining():
            told = "draining", None
        case RuntimeError():
            told = "failed", str(answer)
    return _dumps(told).encode()


def telling(message: StepMessage) -> bytes:
    load = dict(zip(Load.__slots__, _load(message.load), strict=True)) | {"tally": _tally(message.load.tally)}
    return _dumps([[_tokens(one) for one in message.tokens], load, message.draining]).encode()


def heard(said: bytes) -> StepMessage | Answer:
    """What a replica says. Raises ValueError where it is neither."""
    match json.loads(said):
        case [tokens, load, draining]:
            load |= {"resident": tuple(load["resident"]), "tally": Tally(*load["tally"])}
            return StepMessage(tuple(map(_told, tokens)), Load(**load), draining)
        case ["done", _]:
            return None
        case ["full", seconds]:
            return QueueFull(seconds)
        case ["draining", _]:
            return Draining()
        case ["failed", why]:
            return RuntimeError(why)
        case _:
            raise ValueError("neither a message nor an answer")


def _told(row: list[Any]) -> StepTokens:
    told = StepTokens(*row)
    return told if told.probabilities is None else replace(told, probabilities=tuple(told.probabilities))
