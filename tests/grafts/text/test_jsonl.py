"""Training files: what is read, and how each kind of mistake is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polygraft.grafts.text.jsonl import DataError, Example, Limits, read
from polygraft.grafts.text.message import Message

GOOD = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}


def line(*messages: object, **more: object) -> bytes:
    return json.dumps({"messages": messages, **more}).encode() + b"\n"


def failure(raw: bytes, limits: Limits = Limits()) -> tuple[int, str]:
    with pytest.raises(DataError) as caught:
        list(read(raw, limits))
    return caught.value.line, caught.value.message


def test_every_role_and_weight_is_read_with_its_line() -> None:
    system, muted = {"role": "system", "content": "Be brief."}, {**HELLO, "weight": 0}
    raw = GOOD + b"\n" + line(system, HI, muted, HI, {**HELLO, "weight": 1})
    assert list(read(raw)) == [
        Example((Message("user", "Hi"), Message("assistant", "Hello")), 1),
        Example(
            (
                Message("system", "Be brief."),
                Message("user", "Hi"),
                Message("assistant", "Hello", 0),
                Message("user", "Hi"),
                Message("assistant", "Hello", 1),
            ),
            3,
        ),
    ]


def test_a_file_is_read_like_its_bytes_with_mark_carriage_returns_and_no_last_break(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + GOOD.strip())
    assert [example.line for example in read(path)] == [1, 2]


def test_examples_before_the_wrong_line_are_given_out_first() -> None:
    examples = read(GOOD + b"{")
    assert next(examples).line == 1
    with pytest.raises(DataError, match=r"^line 2: not JSON: "):
        next(examples)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"messages": [}', 'not JSON: Expecting value at column 15, near "ssages\\": [}"'),
        (b'{"messages": "\xff"}', "byte 15 (0xff) is not UTF-8"),
        (b'{"messages": [], "messages": []}', "not usable JSON: the key 'messages' is given twice"),
        (b'{"messages": NaN}', "not usable JSON: NaN is not a JSON value"),
        (b"[" * 100_000, "not usable JSON: maximum recursion depth exceeded while decoding a JSON array"),
        (b"[1]", "[1] is not an object with 'messages'"),
        (b"{}", "messages: required, but missing"),
        (b'{"messages": "Hi"}', 'messages: "Hi" is not a list'),
        (b'{"prompt": "a", "completion": "b"}', "prompt-completion pairs are not supported; give the chat format"),
        (b'{"input": {}, "preferred_output": []}', "preference pairs are not supported yet"),
        (b'{"chosen": [], "rejected": []}', "preference pairs are not supported yet"),
        (line(HI, HELLO, tools=[]), "tools: unknown key; the known ones are messages"),
        (line(), "messages: none is from the assistant, so there is nothing to train on"),
        (line(HI), "messages: none is from the assistant, so there is nothing to train on"),
        (line(HI, {**HELLO, "weight": 0}), "messages: every assistant message has weight 0"),
        (line(HI, 7), "messages[1]: 7 is not an object with 'role' and 'content'"),
        (
            line({**HI, "mood": "glad"}, HELLO),
            "messages[0].mood: unknown key; the known ones are annotations, audio, content, function_call, name, "
            "refusal, role, tool_calls, weight",
        ),
        (line({**HI, "name": 7}, HELLO), "messages[0].name: 7 is not a string"),
        (line(HI, {**HELLO, "refusal": "no"}), 'messages[1].refusal: "no" is not supported; leave it out'),
        (
            line({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
            "messages[0].content[0].image_url: unknown key; the known ones are text, type",
        ),
        (
            line({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "audio", "text": "b"}]}),
            'messages[0].content[1].type: "audio" is not of a text part',
        ),
        (line({"role": "user", "content": [{"type": "text"}]}), "messages[0].content[0].text: null is not of a text"),
        (line({"role": "user", "content": [7]}), "messages[0].content[0]: 7 is not of a text part"),
        (line({"role": "robot", "content": "a"}), 'messages[0].role: "robot" is not one of system, user, assistant'),
        (line({"content": "a"}), "messages[0].role: null is not one of system, user, assistant"),
        (line({"role": ["user"], "content": "a"}), 'messages[0].role: ["user"] is not one of system, user, assistant'),
        (line({"role": "tool", "content": "a"}), "messages[0]: tool calls and tool messages are not supported yet"),
        (line(HI, {"role": "assistant", "tool_calls": []}), "messages[1]: tool calls and tool messages are not"),
        (line({"role": "user", "content": 5}), "messages[0].content: 5 is not a string"),
        (line({"role": "user"}), "messages[0].content: null is not a string"),
        (line(HI, {**HELLO, "content": " \n"}), 'messages[1].content: " \\n" is empty'),
        (line({**HI, "content": "\ud800"}), "messages[0].content: holds half of a surrogate pair"),
        (line({**HI, "weight": 1}, HELLO), "messages[0].weight: 1 on a user message; only the assistant's are trained"),
        (line(HI, {**HELLO, "weight": 0.5}), "messages[1].weight: 0.5 is not 0 or 1"),
        (line(HI, {**HELLO, "weight": True}), "messages[1].weight: true is not 0 or 1"),
        (line(HI, {**HELLO, "weight": 2}), "messages[1].weight: 2 is not 0 or 1"),
    ],
)
def test_a_wrong_line_is_named_with_its_field_and_value(raw: bytes, message: str) -> None:
    number, found = failure(GOOD + b"\n" + raw)
    assert number == 3
    assert found.startswith(message)


def test_a_long_value_is_shown_short() -> None:
    _, message = failure(line({"role": "x" * 10_000, "content": "a"}))
    assert len(message) < 150


@pytest.mark.parametrize("raw", [b"", b"\n \n"])
def test_an_empty_file_is_an_error_of_the_file(raw: bytes) -> None:
    assert failure(raw) == (0, "the file is empty; give at least one example")


def test_limits_on_bytes_lines_examples_and_messages_hold(tmp_path: Path) -> None:
    assert failure(GOOD, Limits(file_bytes=10)) == (
        0,
        f"the file has {len(GOOD)} bytes, more than the limit of 10; split it",
    )
    assert failure(GOOD + GOOD, Limits(examples=1)) == (2, "more than the limit of 1 examples; split the file")
    assert failure(GOOD, Limits(messages=1)) == (1, "messages: 2 messages, more than the limit of 1")
    exact = Limits(line_bytes=len(GOOD) - 1)
    assert len(list(read(GOOD + GOOD, exact))) == 2
    assert failure(GOOD + b" " + GOOD, exact) == (2, f"longer than the limit of {len(GOOD) - 1} bytes")
