"""JSON of strangers: read if all readers would find the same in it and it can be written again."""

from __future__ import annotations

import json
import re
import sys

from pydantic import JsonValue

_LEVELS = 32
_VALUES = 100_000
# One that does not end goes to the end of the text, so that no place is looked at twice.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_LARGEST = sys.float_info.max


class JsonError(ValueError):
    """Text that is refused; `path` leads to the value to blame, "" for all of it."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path


def load(text: str | bytes | bytearray) -> JsonValue:
    """The value. Raises JsonError for what is not JSON, NaN and numbers past float64's, half of a surrogate pair, more
    than 32 levels, and more than 100,000 values, which would take seconds to look at."""
    if len(text) > 2 * _VALUES and _marks(text) > 2 * _VALUES:
        raise JsonError("", f"holds more than {_VALUES} values")
    try:
        value: JsonValue = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise JsonError("", f"not JSON at character {error.pos}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # other bytes than UTF-8's, a number of thousands of digits, depth
        raise JsonError("", f"not JSON: {str(error)[:200]}") from None
    _count(value)
    _check(value, ())
    return value


def _marks(text: str | bytes | bytearray) -> int:
    """Beginnings of lists and objects, and commas, outside of strings: at least as many as there are values but one,
    and found in a hundredth of the time and memory that those would take."""
    outside = _STRING.sub(b"", text.encode(errors="ignore") if isinstance(text, str) else text)
    return sum(map(outside.count, (b",", b"[", b"{")))


def _count(value: JsonValue) -> None:
    found, waiting = 1, [value]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict | list):
            found += len(here)
            if found > _VALUES:
                raise JsonError("", f"holds more than {_VALUES} values")
            waiting.extend(here.values() if isinstance(here, dict) else here)


def _check(value: JsonValue, path: tuple[str, ...]) -> None:
    if len(path) > _LEVELS:
        raise JsonError(path[0], f"lists and objects lie in each other more than {_LEVELS} deep")
    match value:
        case str():
            if not _has_bytes(value):
                raise JsonError(".".join(path), "holds half of a surrogate pair, which is no character")
        case int() | float():
            if not -_LARGEST <= value <= _LARGEST:
                raise JsonError(".".join(path), f"is a number past {_LARGEST}")
        case dict():
            if not all(map(_has_bytes, value)):
                raise JsonError(".".join(path), "a key holds half of a surrogate pair, which is no character")
            for key, one in value.items():
                _check(one, (*path, key))
        case list():
            for index, one in enumerate(value):
                _check(one, (*path, str(index)))


def _has_bytes(text: str) -> bool:
    return text.isascii() or text.encode(errors="ignore").decode() == text


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
