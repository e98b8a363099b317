"""Labelled texts: what is read, and how each kind of mistake is named."""

from __future__ import annotations

import json

import pytest

from polygraft.grafts.text.jsonl import DataError, read, read_any, read_labelled_texts
from polygraft.grafts.text.labelled import Labelled, LabelledError, labels_of

GOOD = {"sentence": "A good graft.", "label": "good"}


def line(**record: object) -> bytes:
    return json.dumps(record).encode() + b"\n"


def test_texts_and_pairs_are_read_under_each_of_their_names() -> None:
    raw = line(**GOOD) + b"\n" + line(sentence1="a", sentence2="b", label=1) + line(text="c", text2="d", label="x")
    assert list(read_labelled_texts(raw)) == [
        Labelled("A good graft.", "good", None, 1),
        Labelled("a", "1", "b", 3),
        Labelled("c", "x", "d", 4),
    ]


def test_a_file_is_of_one_kind() -> None:
    chat = line(messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    assert len(list(read_any(chat + line(**GOOD)))) == 2
    with pytest.raises(DataError, match="line 2: label: a labelled text is for a job whose method is"):
        list(read(chat + line(**GOOD)))
    with pytest.raises(DataError, match="line 2: label: required, but missing; a classification"):
        list(read_labelled_texts(line(**GOOD) + chat))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label": 1.5}, "label: 1.5 is not a string or a whole number"),
        ({"label": True}, "label: true is not a string or a whole number"),
        ({"label": " "}, 'label: " " is not a name of 1 to 200 characters'),
        ({"sentence": 7}, "sentence: 7 is not a string"),
        ({"sentence": ""}, 'sentence: "" is empty'),
        ({"sentence": None}, "sentence: none is given; give one of sentence, sentence1, text"),
        ({"text": "b"}, "sentence: sentence and text is given; give one of"),
        ({"sentence2": "\ud800"}, "sentence2: holds half of a surrogate pair"),
        ({"sentence2": "a", "text2": "b"}, "sentence2: text2 is given, too"),
        ({"idx": 3}, "idx: unknown key; the known ones are label, sentence"),
    ],
)
def test_a_wrong_line_is_named_with_its_field_and_value(changes: dict[str, object], said: str) -> None:
    with pytest.raises(DataError) as caught:
        list(read_any(line(**GOOD) + line(**{**GOOD, **changes})))
    assert caught.value.line == 2 and caught.value.message.startswith(said)


def test_labels_are_in_an_order_that_does_not_hang_on_the_file() -> None:
    assert labels_of([Labelled("", label) for label in ("b", "10", "a", "9", "-1", "b")]) == ("-1", "9", "10", "a", "b")
    with pytest.raises(LabelledError, match='"b" is the only one'):
        labels_of([Labelled("", "b")])
    with pytest.raises(LabelledError, match="1001 different ones; at most 1000"):
        labels_of([Labelled("", str(number)) for number in range(1001)])
