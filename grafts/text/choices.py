"""Choice sets: a line is a prompt, the choices for its answer, and the number of the right one."""

from __future__ import annotations

from collections.abc import Mapping

from polygraft.grafts.text.message import Message, MessageError, read_training_message, shown

KEYS = ("answer", "choices", "prompt")
MOST = 64  # choices of an example, each of which is a sample when it is judged


class ChoiceError(ValueError):
    """A line that is no example of a choice set; the message names the field, the value and what to do."""


def read_choices(record: Mapping[str, object]) -> tuple[str, tuple[str, ...], int]:
    """Prompt, choices and the number of the right one, counted from 0. Raises ChoiceError."""
    if unknown := sorted(record.keys() - set(KEYS)):
        raise ChoiceError(f"{unknown[0][:60]}: unknown key; the known ones are {', '.join(KEYS)}")
    for name in KEYS:
        if name not in record:
            raise ChoiceError(f"{name}: required, but missing")
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list):
        raise ChoiceError(f"choices: {shown(choices)} is not a list")
    if not 2 <= len(choices) <= MOST:
        raise ChoiceError(f"choices: {len(choices)} of them; give 2 to {MOST}")
    texts = tuple(_text(one, "assistant", f"choices[{index}]") for index, one in enumerate(choices))
    for index, text in enumerate(texts):
        if text in texts[:index]:
            raise ChoiceError(f"choices[{index}]: {shown(text)} is choices[{texts.index(text)}], too")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
        raise ChoiceError(f"answer: {shown(answer)} is not the number of a choice, which is 0 to {len(texts) - 1}")
    return _text(record["prompt"], "user", "prompt"), texts, answer


def conversation(prompt: str, choice: str) -> tuple[Message, ...]:
    """What a choice is as an answer to the prompt."""
    return (Message("user", prompt), Message("assistant", choice))


def _text(value: object, role: str, where: str) -> str:
    if not isinstance(value, str):
        raise ChoiceError(f"{where}: {shown(value)} is not a string")
    try:
        return read_training_message({"role": role, "content": value}).content
    except MessageError as error:
        raise ChoiceError(f"{where}: {error}") from None
