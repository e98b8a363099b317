"""What a training file holds: chat examples in OpenAI's fine-tuning format, choices, or labelled texts, one JSON object
a line, each checked.

Source of the first format: OpenAI's fine-tuning guide, `{"messages": [{"role", "content", "weight"?}, ...]}`. The
others are `{"prompt", "choices": [...], "answer"}` (`grafts/text/choices.py`) and `{"sentence", "sentence2"?, "label"}`
(`grafts/text/labelled.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from polygraft.grafts.text.choices import ChoiceError, conversation, read_choices
from polygraft.grafts.text.labelled import Labelled, LabelledError, read_labelled
from polygraft.grafts.text.message import Message, MessageError, read_training_message, shown

_PREFERENCE = {"preferred_output", "non_preferred_output", "preferred_completion", "non_preferred_completion"} | {
    "chosen",
    "rejected",
}


class DataError(ValueError):
    """A training file that cannot be used. `line` counts from 1; 0 when the file as a whole is at fault."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"line {line}: {message}" if line else message)
        self.line = line
        self.message = message


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation and the line it came from (0: not from a file); in a choice set it ends with the right one of
    the `choices`, which has number `answer`."""

    messages: tuple[Message, ...]
    line: int = 0
    choices: tuple[str, ...] = ()
    answer: int = 0

    @property
    def others(self) -> tuple[Example, ...]:
        """The same with each of the other choices in the place of the right one."""
        prompt = self.messages[0].content
        wrong = [text for index, text in enumerate(self.choices) if index != self.answer]
        return tuple(Example(conversation(prompt, text), self.line) for text in wrong)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a training file may hold. A line counts without its line break."""

    file_bytes: int = 512 * 1024 * 1024
    line_bytes: int = 1024 * 1024
    examples: int = 1_000_000
    messages: int = 1_000


def as_written(file: Path) -> Hashable:
    """The file as it was last written: another value once it is written again. Raises FileNotFoundError."""
    found = file.stat()
    return file, found.st_mtime_ns, found.st_size


def read(source: bytes | Path, limits: Limits = Limits()) -> Iterator[Example]:
    """The conversations of a file in order, holding one line in memory at a time. Blank lines are skipped.

    Raises DataError at the first line that is wrong, and at the end of a file without examples.
    """
    for example in read_any(source, limits):
        if isinstance(example, Labelled):
            raise DataError(example.line, "label: a labelled text is for a job whose method is 'classification'")
        yield example


def read_labelled_texts(source: bytes | Path, limits: Limits = Limits()) -> Iterator[Labelled]:
    """The same for a file of labelled texts."""
    for example in read_any(source, limits):
        if isinstance(example, Example):
            raise DataError(example.line, "label: required, but missing; a classification is of texts with labels")
        yield example


def read_any(source: bytes | Path, limits: Limits = Limits()) -> Iterator[Example | Labelled]:
    """The same for a file of whichever."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > limits.file_bytes:
        raise DataError(0, f"the file has {size} bytes, more than the limit of {limits.file_bytes}; split it")
    found = 0
    with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        for line, raw in _lines(file, limits.line_bytes):
            found += 1
            if found > limits.examples:
                raise DataError(line, f"more than the limit of {limits.examples} examples; split the file")
            yield parse(raw, line, limits)
    if not found:
        raise DataError(0, "the file is empty; give at least one example")


def parse(raw: bytes, line: int, limits: Limits = Limits()) -> Example | Labelled:
    """The example on one line. Raises DataError naming the line, the field and the offending value."""
    record = {key: value for key, value in _object(raw, line).items() if value is not None}
    if _PREFERENCE & record.keys():
        raise DataError(line, "preference pairs are not supported yet; give one conversation under 'messages'")
    if "choices" in record and "messages" not in record:
        try:
            prompt, choices, answer = read_choices(record)
        except ChoiceError as error:
            raise DataError(line, str(error)) from None
        return Example(conversation(prompt, choices[answer]), line, choices, answer)
    if "label" in record and "messages" not in record:
        try:
            return read_labelled(record, line)
        except LabelledError as error:
            raise DataError(line, str(error)) from None
    if "prompt" in record and "messages" not in record:
        raise DataError(line, "prompt-completion pairs are not supported; give the chat format under 'messages'")
    if unknown := sorted(record.keys() - {"messages"}):
        raise DataError(line, f"{unknown[0][:60]}: unknown key; the known ones are messages")
    if "messages" not in record:
        raise DataError(line, "messages: required, but missing")
    entries = record["messages"]
    if not isinstance(entries, list):
        raise DataError(line, f"messages: {shown(entries)} is not a list")
    if len(entries) > limits.messages:
        raise DataError(line, f"messages: {len(entries)} messages, more than the limit of {limits.messages}")
    messages = tuple(_message(entry, line, f"messages[{index}]") for index, entry in enumerate(entries))
    if not any(message.role == "assistant" for message in messages):
        raise DataError(line, "messages: none is from the assistant, so there is nothing to train on")
    if not any(message.trained for message in messages):
        raise DataError(line, "messages: every assistant message has weight 0; give at least one of them weight 1")
    return Example(messages, line)


def _lines(file: BinaryIO, limit: int) -> Iterator[tuple[int, bytes]]:
    line = 0
    while raw := file.readline(limit + 2):
        line += 1
        if line == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")  # the byte order mark some editors write
        raw = raw.rstrip(b"\r\n")
        if len(raw) > limit:
            raise DataError(line, f"longer than the limit of {limit} bytes")
        if raw.strip():
            yield line, raw


def _object(raw: bytes, line: int) -> dict[str, object]:
    try:
        record: object = json.loads(raw.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise DataError(line, f"byte {error.start + 1} ({raw[error.start]:#04x}) is not UTF-8") from None
    except json.JSONDecodeError as error:
        near = error.doc[max(0, error.pos - 10) : error.pos + 20]
        raise DataError(line, f"not JSON: {error.msg} at column {error.colno}, near {shown(near)}") from None
    except (ValueError, RecursionError) as error:  # a repeated key, NaN, a number of thousands of digits, deep nesting
        raise DataError(line, f"not usable JSON: {str(error)[:100]}") from None
    if not isinstance(record, dict):
        raise DataError(line, f"{shown(record)} is not an object with 'messages'")
    return record


def _message(entry: object, line: int, where: str) -> Message:
    try:
        return read_training_message(entry)
    except MessageError as error:
        raise DataError(line, f"{where}{'.' if error.path else ''}{error.path}: {error}") from None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return record


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON value")
