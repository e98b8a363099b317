"""JSON of strangers: what is refused before it costs anything."""

from __future__ import annotations

import json
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from polygraft.grafts.text.plain_json import JsonError, _marks, load

LARGE = 4 << 20
values: st.SearchStrategy[JsonValue] = st.recursive(
    st.none() | st.integers() | st.text(alphabet='a,[{"\\'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='b,[{"\\'), inner),
)


def count(value: JsonValue) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(count(one) for one in inner)


@given(values)
def test_marks_are_never_fewer_than_the_values_after_the_first(value: JsonValue) -> None:
    text = json.dumps(value)
    assert count(value) - 1 <= _marks(text) == _marks(text.encode()) <= 2 * count(value)


def test_a_hundred_thousand_values_are_read_and_more_are_refused() -> None:
    most = b"[" + b"1," * 99_998 + b"1]"
    assert len(load(most)) == 99_999  # type: ignore[arg-type]
    for more in (b"[" + b"1," * 99_999 + b"1]", b"[" + b"[]," * (LARGE // 3) + b"1]", b"[" + b"{}," * 150_000 + b"1]"):
        with pytest.raises(JsonError, match="holds more than 100000 values"):
            load(more)
    assert load(json.dumps("a,[" * (LARGE // 3))) == "a,[" * (LARGE // 3)  # of a text's marks none counts


@pytest.mark.parametrize("piece", [b'"\\', b'"', b"\\", b'\\"', b'",', b"[", b"9", b'{"a":'])
def test_whatever_is_repeated_is_read_or_refused_within_a_second(piece: bytes) -> None:
    began = time.perf_counter()
    for start in (b"", b'"', b'["'):
        with suppress(JsonError):
            load(start + piece * (LARGE // len(piece)))
    assert time.perf_counter() - began < 3.0
