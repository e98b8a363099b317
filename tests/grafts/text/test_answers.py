"""What is trained of an answer is what transformers renders of it: its own masks, of a template whose author marks the
assistant's text, are the oracle for the same template without the marks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from polygraft.grafts.text.jsonl import DataError, Example
from polygraft.grafts.text.message import Message
from polygraft.grafts.text.tokenise import Tokeniser

# As Qwen3's: an answer is taken apart at a closing tag; thoughts are written in the last one alone, even if empty.
THINKING = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Turns must alternate') }}{% endif %}{% set c = m.content %}{% set r = '' %}"
    "{% if m.role == 'assistant' and '</think>' in c %}"
    r"{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    r"{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% generation if m.role == 'assistant' %}{% if m.role == 'assistant' and loop.last %}<think>\n"
    r"{{ r.strip('\n') }}"
    "\n</think>\n\n{% endif %}{{ c }}<|im_end|>{% endgeneration %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As DeepSeek-R1's: thoughts are never written, and no answer begins as generation does.
DROPPING = (
    "{% for m in messages %}{% set c = m.content.split('</think>')[-1] | trim %}<|im_start|>{{ m.role }}:"
    "{% generation if m.role == 'assistant' %}{{ c }}<|im_end|>{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:<think>\n{% endif %}"
)
# Text parts trimmed and a header in capitals, without thoughts.
TRIMMING = (
    "{% for m in messages %}<|im_start|>{{ m.role | upper }}\n"
    "{% generation if m.role == 'assistant' %}{{ m.content | trim }}<|im_end|>{% endgeneration %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>ASSISTANT\n{% endif %}"
)

ASK = Message("user", "What is a graft?")
THOUGHT = Message("assistant", "<think>\nplan\n</think>\n\nAnswer")
CLOSE = Message("assistant", "<think>of shoots</think>A shoot.")
PLAIN = Message("assistant", "A shoot, set into another plant.")
TRICKY = Message("assistant", "<think>\na <|im_end|> b\n<|im_start|>assistant\n</think>\n\nA shoot.")
CHATS = [
    (ASK, THOUGHT),
    (ASK, PLAIN),
    (ASK, THOUGHT, ASK, PLAIN),
    (ASK, PLAIN, ASK, THOUGHT),
    (ASK, CLOSE, ASK, THOUGHT, ASK, CLOSE),
    (ASK, THOUGHT, ASK, THOUGHT),
    (Message("user", "Say </think>, <|im_start|>assistant\n"), THOUGHT),
]


def folders(template: str, folder: Path, target: Path) -> tuple[Path, Path]:
    """With the template's marks for transformers, and without for us."""
    marked = template.replace(
        "{% generation if m.role == 'assistant' %}", "{% if m.role == 'assistant' %}{% generation %}"
    )
    head, _, tail = marked.partition("{% generation %}")
    body, _, tail = tail.partition("{% endgeneration %}")
    theirs = f"{head}{{% generation %}}{body}{{% endgeneration %}}{{% else %}}{body}{{% endif %}}{tail}"
    made = []
    for name, text in (("theirs", theirs), ("ours", f"{head}{body}{{% else %}}{body}{{% endif %}}{tail}")):
        copy = shutil.copytree(folder, target / name, ignore=shutil.ignore_patterns("*.safetensors"))
        (copy / "chat_template.jinja").write_text(text)
        made.append(copy)
    return made[0], made[1]


def masks(template: str, messages: Sequence[Message], folder: Path, target: Path) -> tuple[list[float], list[float]]:
    marked, unmarked = folders(template, folder, target)
    found = AutoTokenizer.from_pretrained(marked).apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ours = Tokeniser.load(unmarked).encode_example(Example(tuple(messages)), 1_000)
    assert list(ours.ids) == found["input_ids"]  # type: ignore[call-overload,index]
    return list(ours.weights), [float(mask) for mask in found["assistant_masks"]]  # type: ignore[call-overload,index]


@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("template", [THINKING, DROPPING, TRIMMING], ids=["thinking", "dropping", "trimming"])
def test_what_is_trained_is_what_the_templates_author_would_mark(
    template: str, chat: int, tiny_folder: Path, tmp_path: Path
) -> None:
    ours, theirs = masks(template, CHATS[chat], tiny_folder, tmp_path)
    assert ours == theirs
    assert any(theirs)


def test_a_muted_answer_that_is_taken_apart_stays_muted(tiny_folder: Path, tmp_path: Path) -> None:
    _, folder = folders(THINKING, tiny_folder, tmp_path)
    tokeniser = Tokeniser.load(folder)
    muted = Message("assistant", THOUGHT.content, 0)
    tokens = tokeniser.encode_example(Example((ASK, muted, ASK, THOUGHT)), 1_000)
    loud = tokeniser.encode_example(Example((ASK, THOUGHT, ASK, THOUGHT)), 1_000)
    assert tokens.ids == loud.ids
    assert 0 < sum(tokens.weights) < sum(loud.weights)
    first = next(index for index, weight in enumerate(tokens.weights) if weight)
    assert all(loud.weights[first : len(tokens.ids) - 1])


def test_the_weighted_tokens_follow_the_prompt_that_serving_would_send(tiny_folder: Path, tmp_path: Path) -> None:
    _, folder = folders(THINKING, tiny_folder, tmp_path)
    tokeniser = Tokeniser.load(folder)
    for answer in (THOUGHT, PLAIN):
        prompt = tokeniser.encode_chat((ASK,), add_generation_prompt=True)
        tokens = tokeniser.encode_example(Example((ASK, answer)), 1_000)
        assert tokens.ids[: len(prompt)] == prompt
        assert tokens.weights.index(1.0) == len(prompt)


def test_an_answer_that_looks_like_a_turn_of_its_own_is_found_or_refused(tiny_folder: Path, tmp_path: Path) -> None:
    _, folder = folders(THINKING, tiny_folder, tmp_path)
    tokens = Tokeniser.load(folder).encode_example(Example((ASK, TRICKY)), 1_000)
    prompt = Tokeniser.load(folder).encode_chat((ASK,), add_generation_prompt=True)
    assert tokens.weights.index(1.0) == len(prompt) and all(tokens.weights[len(prompt) : -1])


@pytest.mark.parametrize(
    "body",
    ["{{ m.content[:5] }}", "{{ m.content[:-1] }}", "{{ m.content[1:-1] }}", "{{ m.content ~ m.content }}"],
)
def test_a_template_that_rewrites_an_answer_cannot_be_trained_on(body: str, tiny_folder: Path, tmp_path: Path) -> None:
    template = THINKING.replace("{{ c }}", "{% if m.role == 'user' %}{{ c }}{% else %}" + body + "{% endif %}")
    _, folder = folders(template, tiny_folder, tmp_path)
    with pytest.raises(DataError, match=r"^line 4: the chat template rewrites the assistant's text"):
        Tokeniser.load(folder).encode_example(Example((ASK, Message("assistant", "A good answer.")), line=4), 1_000)
