"""Token ids equal transformers', and the loss weights lie on the assistant's text and the end of its turn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from polygraft.grafts.text.chat import ChatError
from polygraft.grafts.text.jsonl import DataError, Example
from polygraft.grafts.text.message import Message
from polygraft.grafts.text.tokenise import Tokeniser, TokeniserError, Tokens

SYSTEM, USER = Message("system", "Be brief."), Message("user", "What is a graft?")
ANSWER, MUTED = Message("assistant", "A shoot, set into another plant."), Message("assistant", "Hm.", 0)
ODD = Message("user", "  in 2019:\n    12 déjà vu 👩‍🌾 日本語 <|im_end|> x\t")
CHATS = [(USER,), (SYSTEM, USER), (USER, ANSWER, ODD), (SYSTEM, ODD, MUTED, USER, ANSWER), (ANSWER,)]

# Templates in the manner of families that a backbone can come from.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
)
WITHOUT_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
ALTERNATING = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
REWRITING = "{% for m in messages %}{{ m.content[:5] }}{% endfor %}"


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Tokeniser:
    return Tokeniser.load(tiny_folder)


def with_template(folder: Path, tmp_path: Path, template: str) -> Tokeniser:
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    (copy / "chat_template.jinja").write_text(template)
    return Tokeniser.load(copy)


def weighted(tokeniser: Tokeniser, *messages: Message) -> str:
    """The weighted tokens' text, a bar between separate runs of them."""
    tokens = tokeniser.encode_example(Example(messages), 1_000)
    runs: list[list[int]] = [[]]
    for id, weight in zip(tokens.ids, tokens.weights, strict=True):
        if weight == 0.0 and runs[-1]:
            runs.append([])
        elif weight:
            assert weight == 1.0
            runs[-1].append(id)
    return "|".join(tokeniser._tokenizer.decode(run, skip_special_tokens=False) for run in runs if run)


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("backbone", ["tiny_folder", "smollm2_folder"])
def test_ids_equal_transformers(backbone: str, messages: tuple[Message, ...], request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(backbone)
    ours, theirs = Tokeniser.load(folder), AutoTokenizer.from_pretrained(folder)
    plain = [{"role": message.role, "content": message.content} for message in messages]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(plain, add_generation_prompt=prompt, return_dict=False)
        assert list(ours.encode_chat(messages, add_generation_prompt=prompt)) == expected
    assert list(ours.encode_text(messages[0].content)) == theirs(messages[0].content)["input_ids"]
    if any(message.trained for message in messages):
        whole = theirs.apply_chat_template(plain, return_dict=False)
        assert list(ours.encode_example(Example(messages), 1_000).ids) == whole


@pytest.mark.parametrize("backbone", ["tiny_folder", "smollm2_folder"])
def test_the_answer_and_its_end_of_turn_are_weighted(backbone: str, request: pytest.FixtureRequest) -> None:
    tokeniser = Tokeniser.load(request.getfixturevalue(backbone))
    assert weighted(tokeniser, USER, ANSWER) == "A shoot, set into another plant.<|im_end|>"
    assert weighted(tokeniser, SYSTEM, USER, MUTED, ODD, ANSWER) == "A shoot, set into another plant.<|im_end|>"
    yes = Message("assistant", "Yes.")
    assert weighted(tokeniser, USER, yes, USER, yes) == "Yes.<|im_end|>|Yes.<|im_end|>"
    assert weighted(tokeniser, USER, Message("assistant", "日本 👩‍🌾")) == "日本 👩‍🌾<|im_end|>"


def test_the_weighted_tokens_follow_the_prompt_that_serving_would_send(tiny: Tokeniser) -> None:
    prompt = tiny.encode_chat((USER,), add_generation_prompt=True)
    tokens = tiny.encode_example(Example((USER, ANSWER)), 1_000)
    assert tokens.ids[: len(prompt)] == prompt
    first = next(index for index, weight in enumerate(tokens.weights) if weight)
    assert first == len(prompt)
    assert tokens.ids[max(index for index, weight in enumerate(tokens.weights) if weight)] in tiny.eos_ids


def test_an_answer_that_comes_first_is_found_behind_the_default_system_prompt(tiny: Tokeniser) -> None:
    assert weighted(tiny, ANSWER, USER) == "A shoot, set into another plant.<|im_end|>"


def test_white_space_around_an_answer_belongs_to_it(tiny: Tokeniser) -> None:
    assert weighted(tiny, USER, Message("assistant", "  Yes. ")) == "  Yes. <|im_end|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA2, " A shoot. <|im_end|>| A plant. <|im_end|>"),
        (QWEN3, "A shoot.<|im_end|>|A plant.<|im_end|>"),
        (WITHOUT_END, " A shoot.| A plant."),
    ],
)
def test_answers_are_found_in_other_families_templates(
    template: str, expected: str, tiny_folder: Path, tmp_path: Path
) -> None:
    tokeniser = with_template(tiny_folder, tmp_path, template)
    answers = [Message("assistant", text) for text in ("A shoot.", "A plant.")]
    assert weighted(tokeniser, USER, answers[0], USER, answers[1]) == expected


def test_truncation_cuts_the_end_and_needs_a_weighted_token_left(tiny: Tokeniser) -> None:
    whole = tiny.encode_example(Example((USER, ANSWER)), 1_000)
    first = whole.weights.index(1.0)
    assert tiny.encode_example(Example((USER, ANSWER)), first + 1) == Tokens(
        whole.ids[: first + 1], whole.weights[: first + 1]
    )
    with pytest.raises(
        DataError, match=rf"^line 7: none of the first {first} tokens \(max_length\) of {len(whole.ids)}"
    ):
        tiny.encode_example(Example((USER, ANSWER), line=7), first)


def test_a_template_that_refuses_an_example_is_named_with_its_line(tiny_folder: Path, tmp_path: Path) -> None:
    tokeniser = with_template(tiny_folder, tmp_path, ALTERNATING)
    with pytest.raises(DataError, match=r"^line 3: the chat template refuses the messages: user first"):
        tokeniser.encode_example(Example((SYSTEM, ANSWER), line=3), 100)


def test_a_template_that_rewrites_answers_cannot_be_trained_on(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^line 4: the chat template rewrites the assistant's text"):
        with_template(tiny_folder, tmp_path, REWRITING).encode_example(Example((USER, ANSWER), line=4), 100)


def test_a_tokenizer_without_template_still_encodes_text(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
    tokeniser = Tokeniser.load(tmp_path)
    assert tokeniser.decode(tokeniser.encode_text("a graft")) == "a graft"
    with pytest.raises(ChatError, match="has no chat template"):
        tokeniser.encode_chat((USER,), add_generation_prompt=True)


def test_a_template_in_the_config_is_read_like_one_in_a_file(
    tiny_folder: Path, tmp_path: Path, tiny: Tokeniser
) -> None:
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config |= {"chat_template": [{"name": "default", "template": template}], "eos_token": {"content": "<|im_end|>"}}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokeniser.load(copy).fingerprint == tiny.fingerprint


def test_the_fingerprint_changes_with_the_template(tiny_folder: Path, tmp_path: Path, tiny: Tokeniser) -> None:
    assert Tokeniser.load(tiny_folder).fingerprint == tiny.fingerprint
    assert with_template(tiny_folder, tmp_path, LLAMA2).fingerprint != tiny.fingerprint


def test_a_token_that_the_backbone_has_no_embedding_for_is_refused_with_its_line(
    tiny_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_tokens(["<NEW>"])
    tokenizer.save(str(copy / "tokenizer.json"))
    tokeniser = Tokeniser.load(copy)
    assert tokeniser.vocabulary == 513
    message = r'"<NEW>" is token 512, for which the backbone has no embedding: its vocabulary has 512 \(0 to 511\)'
    poison = Message("user", "y <NEW> z")
    with pytest.raises(DataError, match=f"^line 7: {message}"):
        tokeniser.encode_example(Example((poison, ANSWER), line=7), 1_000)
    with pytest.raises(ChatError, match=message):
        tokeniser.encode_chat((poison,), add_generation_prompt=True)
    with pytest.raises(ChatError, match=message):
        tokeniser.encode_text(poison.content)
    assert tokeniser.encode_example(Example((USER, ANSWER)), 1_000).ids


def test_stop_tokens_are_all_that_any_file_names(tiny_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    (copy / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    assert Tokeniser.load(copy).eos_ids == (0, 2, 7)


def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokeniserError, match=r"tokenizer.json is missing"):
        Tokeniser.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokeniserError, match=r"tokenizer.json is not a tokenizer"):
        Tokeniser.load(tmp_path)
