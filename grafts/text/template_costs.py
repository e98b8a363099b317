"""What a function that a chat template calls may cost. Nothing stops a call once it runs, so what would take too long
or grow too large in it is refused before. Pure; sizes are in characters and stop being counted above a limit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Filters that no chat template needs, whose time grows faster than what they are given, or as slowly as Python loops.
LEFT_OUT = _names("filesizeformat forceescape pprint random striptags urlencode urlize wordcount wordwrap xmlattr")
# Methods of text that take a table or a codec, or whose time is the square of the text's length.
NO_METHODS = _names("encode maketrans striptags translate unescape")
# Filters and tests that do not read what lies inside a list, and that are asked of all messages at every turn.
_LIGHT = _names(
    "abs attr batch boolean callable count d default defined divisibleby escaped even false filter first float "
    "integer items iterable last length list map mapping none number odd reject rejectattr reverse round sameas "
    "select selectattr sequence slice test true undefined"
)
_ITERATING = _names(
    "batch dictsort groupby join list map max min reject rejectattr reverse select selectattr slice sort sum unique"
)
_SORTING = _names("dictsort groupby max min sort unique")
# Those that make an object of each line, word or character.
_SPLITTING = _names("indent partition rpartition rsplit split splitlines title")
# Those that may compare each character of one text with each of another.
_SEARCHING = _names("lstrip rfind rindex rpartition rsplit rstrip strip trim")
# Those whose result can be as large as the product of what they are given.
_GROWING = _names("batch center expandtabs indent join ljust replace rjust slice truncate zfill")
_COUNTING = _GROWING | {"round"}  # an argument may be a width or a count
_FORMATTING = _names("format format_map")
_FORBIDDEN_FORMAT = re.compile(r"\d{5,}|\*|\{[^{}]+\{")  # a width of five digits, or one that comes from an argument
_WIDEST = 9_999  # what is left of widths
_LARGEST_INT = 100_000
_LONGEST_LIST = 100_000  # that is gone through in Python
_LONGEST_SPLIT = 2_000_000
_LONGEST_FORMAT = 50_000
_ESCAPED = 12  # of a character in JSON or in a list that is printed


class TemplateLimit(ValueError):
    """A chat template that takes more steps, text or time than it may."""


def price(name: str, value: object, args: Sequence[object], limit: int) -> int:
    """How many characters the function `name` reads of `value`, the text or list that it is called on, and of `args`.

    Raises TemplateLimit where that is more than `limit`, or the function could take long or make eight times as much.
    """
    if name in _COUNTING and any(isinstance(arg, int) and abs(arg) > _LARGEST_INT for arg in args):
        raise TemplateLimit(f"the chat template calls {name} with a number above {_LARGEST_INT}")
    if name in _ITERATING and isinstance(value, (str, list, tuple, Mapping)) and len(value) > _LONGEST_LIST:
        raise TemplateLimit(f"the chat template calls {name} on more than {_LONGEST_LIST} things")
    read = 0
    for each in args if name in _LIGHT and not isinstance(value, str) else (value, *args):
        read += characters(each, limit)
    if read > (limit // 8 if name in _SORTING else limit) or _work(name, value, args, limit) > 8 * limit:
        raise TemplateLimit(f"the chat template calls {name} on values too large")
    return read


def characters(value: object, limit: int) -> int:
    """About how long `str(value)` would be; stops counting above `limit`."""
    if isinstance(value, (str, bytes)):
        return len(value)
    found, waiting = 0, [value]
    while waiting and found <= limit:
        here = waiting.pop()
        if isinstance(here, (str, bytes)):
            found += 4 + (len(here) if here.isascii() else _ESCAPED * len(here))
        elif isinstance(here, Mapping):
            found += 4
            waiting.extend(here.keys())
            waiting.extend(here.values())
        elif isinstance(here, (list, tuple, set, frozenset)):
            found += 4
            waiting.extend(here)
        elif here is not None:
            found += 8
    return found


def elements(value: object, limit: int) -> int:
    """How many values hang under `value`, each as often as it is reachable; stops counting above `limit`."""
    found, waiting = 0, [value]
    while waiting and found <= limit:
        found += 1
        here = waiting.pop()
        if isinstance(here, Mapping):
            waiting.extend(here.values())
        elif isinstance(here, (list, tuple, set, frozenset)):
            waiting.extend(here)
    return found


def too_large(operator: str, left: object, right: object, limit: int) -> bool:
    """Whether `*` or `**` would repeat a sequence beyond `limit`, or give an integer of more than 10,000 bits."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length() > 10_000
    if isinstance(left, (int, str, bytes, list, tuple)) and isinstance(right, (int, str, bytes, list, tuple)):
        return _magnitude(left) * _magnitude(right) > limit
    return False


def _work(name: str, value: object, args: Sequence[object], limit: int) -> int:
    """At most so many characters are compared or written; more than eight times `limit` for what is never allowed."""
    never = 8 * limit + 1
    if name in _FORMATTING and isinstance(value, str):
        if any(isinstance(each, str) and _FORBIDDEN_FORMAT.search(each) for each in (value, *args)):
            raise TemplateLimit("the chat template formats with a width of five digits or a computed one")
        if len(value) > _LONGEST_FORMAT:
            return never
        return (value.count("%") + value.count("{")) * (_WIDEST + sum(characters(arg, limit) for arg in args))
    if name == "tojson":
        wide = max((arg for arg in args if isinstance(arg, int)), default=0)
        if wide > 16 or any(characters(arg, 64) > 32 for arg in args):  # an indent or separators
            return never
        return _ESCAPED * characters(value, limit) + elements(value, limit) * wide * _depth(value)
    if name == "strftime_now" and isinstance(value, str):
        return never if len(value) > 100 else 0
    if name == "sum" and any(isinstance(arg, (list, tuple)) for arg in args):  # a sum of lists is quadratic
        return never
    if name in _SPLITTING and isinstance(value, str) and len(value) > _LONGEST_SPLIT:
        return never
    work = 1
    if name in _GROWING or (name in _SEARCHING and isinstance(value, str)):
        for each in (value, *args):
            work *= max(1, _magnitude(each))
    return work


def _magnitude(value: object) -> int:
    """What an argument contributes to the size of a result: the length of a sequence, an int as a count or a width."""
    if isinstance(value, (str, bytes, list, tuple, Mapping, range)):
        return len(value)
    return abs(value) if isinstance(value, int) else 1


def _depth(value: object) -> int:
    """How deep lists lie in each other, at most 100."""
    depth, here = 0, [value]
    while depth < 100 and (here := [one for one in here if isinstance(one, (Mapping, list, tuple))]):
        depth += 1
        here = [one for each in here for one in (each.values() if isinstance(each, Mapping) else each)]
    return depth
