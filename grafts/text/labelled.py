"""Labelled texts, as GLUE's tasks have them: a line is a sentence, maybe a second one, and a label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from polygraft.grafts.text.message import MessageError, read_training_message, shown

FIRST = ("sentence", "sentence1", "text")
SECOND = ("sentence2", "text2")
KEYS = ("label", *FIRST, *SECOND)
MOST = 1000  # labels of a job
_LABEL = 200  # characters


class LabelledError(ValueError):
    """A line that is no labelled text; the message names the field, the value and what to do."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or a pair, and what it is labelled with, from a line (0: not from a file)."""

    text: str
    label: str
    second: str | None = None
    line: int = 0


def read_labelled(record: Mapping[str, object], line: int) -> Labelled:
    """Raises LabelledError."""
    if unknown := sorted(record.keys() - set(KEYS)):
        raise LabelledError(f"{unknown[0][:60]}: unknown key; the known ones are {', '.join(sorted(KEYS))}")
    firsts, seconds = ([name for name in names if name in record] for names in (FIRST, SECOND))
    if len(firsts) != 1:
        raise LabelledError(f"sentence: {' and '.join(firsts) or 'none'} is given; give one of {', '.join(FIRST)}")
    if len(seconds) > 1:
        raise LabelledError(f"{seconds[0]}: {seconds[1]} is given, too; give one of them")
    second = _text(record[seconds[0]], seconds[0]) if seconds else None
    return Labelled(_text(record[firsts[0]], firsts[0]), _label(record["label"]), second, line)


def labels_of(examples: Iterable[Labelled]) -> tuple[str, ...]:
    """The labels that occur, whole numbers by size and before words, words by the alphabet. Raises LabelledError for
    fewer than two and for too many."""
    found = {example.label for example in examples}
    if len(found) < 2:
        only = ", ".join(map(shown, found))
        raise LabelledError(f"label: {only or 'none'} is the only one; there is nothing to tell apart")
    if len(found) > MOST:
        raise LabelledError(f"label: {len(found)} different ones; at most {MOST}")
    return tuple(sorted(found, key=lambda label: (0, int(label), "") if _whole(label) else (1, 0, label)))


def _label(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise LabelledError(f"label: {shown(value)} is not a string or a whole number")
    if not value.strip() or len(value) > _LABEL:
        raise LabelledError(f"label: {shown(value)} is not a name of 1 to {_LABEL} characters")
    return _checked(value, "label")


def _whole(label: str) -> bool:
    return label.removeprefix("-").isdecimal() and label.isascii()


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise LabelledError(f"{where}: {shown(value)} is not a string")
    return _checked(value, where)


def _checked(text: str, where: str) -> str:
    try:
        return read_training_message({"role": "user", "content": text}).content
    except MessageError as error:
        raise LabelledError(f"{where}: {error}") from None
