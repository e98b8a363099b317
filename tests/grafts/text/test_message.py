"""One rule for messages, in training files and in chats: what the stock client writes is taken by both."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from openai.types.chat import ChatCompletionMessage

from polygraft.grafts.text.jsonl import DataError, Example, read
from polygraft.grafts.text.message import ChatMessage, Message

HI: Mapping[str, object] = {"role": "user", "content": "Hi"}
HELLO: Mapping[str, object] = {"role": "assistant", "content": "Hello"}
PARTS = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]


def trained(*messages: object, **more: object) -> tuple[Message, ...]:
    (example,) = read(json.dumps({"messages": messages, **more}).encode())
    return example.messages


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (HELLO, Message("assistant", "Hello")),
        ({**HELLO, "content": PARTS}, Message("assistant", "Hello")),
        ({**HELLO, "name": "Ann"}, Message("assistant", "Hello")),
        (
            {**HELLO, "refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None},
            Message("assistant", "Hello"),
        ),
        ({**HELLO, "annotations": []}, Message("assistant", "Hello")),
        ({**HELLO, "tool_call_id": None}, Message("assistant", "Hello")),  # as data sets fill other rows' fields
        ({**HI, "content": [{**PARTS[0], "image_url": None}]}, Message("user", "He")),
        ({"role": "developer", "content": "Be brief."}, Message("system", "Be brief.")),
        ({"role": "system", "content": "Be brief."}, Message("system", "Be brief.")),
    ],
)
def test_training_and_chat_take_a_message_and_mean_the_same(written: Mapping[str, object], meant: Message) -> None:
    assert trained(written, HELLO)[0] == meant
    assert ChatMessage.model_validate(written).message == meant


def test_what_the_stock_client_writes_of_an_answer_is_an_answer() -> None:
    dumped = ChatCompletionMessage(role="assistant", content="Hello").model_dump()
    assert None in dumped.values()
    assert trained(HI, dumped) == (Message("user", "Hi"), Message("assistant", "Hello"))
    assert ChatMessage.model_validate(dumped).message == Message("assistant", "Hello")


def test_null_is_absent_beside_the_messages_too_and_as_a_weight() -> None:
    assert trained(HI, {**HELLO, "weight": None}, tools=None, parallel_tool_calls=None, chosen=None) == (
        Message("user", "Hi"),
        Message("assistant", "Hello", 1),
    )


@pytest.mark.parametrize(
    "written",
    [
        {**HI, "content": None},
        {**HI, "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {**HI, "role": "tool"},
        {**HELLO, "tool_calls": [{}]},
        {**HELLO, "refusal": "I cannot."},
        {**HI, "mood": "glad"},
        {**HI, "name": 5},
    ],
)
def test_training_and_chat_refuse_the_same(written: Mapping[str, object]) -> None:
    with pytest.raises(DataError, match=r"^line 1: messages\[0\]"):
        trained(written, HELLO)
    with pytest.raises(ValueError, match="validation error"):
        ChatMessage.model_validate(written)


def test_an_example_of_the_new_kinds_keeps_its_line() -> None:
    line = json.dumps({"messages": [HI, HELLO]}).encode()
    assert [one.line for one in read(line + b"\n\n" + line)] == [1, 3]
    assert next(read(line)) == Example((Message("user", "Hi"), Message("assistant", "Hello")), 1)
