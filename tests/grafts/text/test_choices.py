"""Choice sets: what is read, and how each kind of mistake is named."""

from __future__ import annotations

import json

import pytest

from polygraft.grafts.text.jsonl import DataError, read
from polygraft.grafts.text.message import Message

GOOD = {"prompt": "What gives the fruit?", "choices": ["The stock.", "The graft."], "answer": 1}


def line(**changes: object) -> bytes:
    return json.dumps({**GOOD, **changes}).encode() + b"\n"


def test_an_example_is_the_conversation_with_its_right_choice_and_knows_the_others() -> None:
    (one,) = read(b"\n" + line())
    assert one.messages == (Message("user", "What gives the fruit?"), Message("assistant", "The graft."))
    assert (one.choices, one.answer, one.line) == (("The stock.", "The graft."), 1, 2)
    (other,) = one.others
    assert other.messages == (Message("user", "What gives the fruit?"), Message("assistant", "The stock."))


def test_chat_examples_have_no_others() -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    first, second = read(json.dumps(chat).encode() + b"\n" + line(answer=0))
    assert first.others == () and len(second.others) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answer": None}, "answer: required, but missing"),
        ({"answer": 2}, "answer: 2 is not the number of a choice, which is 0 to 1"),
        ({"answer": -1}, "answer: -1 is not the number of a choice"),
        ({"answer": True}, "answer: true is not the number of a choice"),
        ({"answer": "The graft."}, 'answer: "The graft." is not the number of a choice'),
        ({"choices": "ab"}, 'choices: "ab" is not a list'),
        ({"choices": ["a"]}, "choices: 1 of them; give 2 to 64"),
        ({"choices": ["a"] * 65}, "choices: 65 of them; give 2 to 64"),
        ({"choices": ["a", 7]}, "choices[1]: 7 is not a string"),
        ({"choices": ["a", " "]}, 'choices[1]: " " is empty'),
        ({"choices": ["a", "b", "a"]}, 'choices[2]: "a" is choices[0], too'),
        ({"prompt": None}, "prompt: required, but missing"),
        ({"prompt": ["x"]}, 'prompt: ["x"] is not a string'),
        ({"prompt": ""}, 'prompt: "" is empty'),
        ({"prompt": "\ud800"}, "prompt: holds half of a surrogate pair"),
        ({"label": 1}, "label: unknown key; the known ones are answer, choices, prompt"),
    ],
)
def test_a_wrong_line_is_named_with_its_field_and_value(changes: dict[str, object], said: str) -> None:
    with pytest.raises(DataError) as caught:
        list(read(line() + line(**changes)))
    assert caught.value.line == 2 and caught.value.message.startswith(said)
