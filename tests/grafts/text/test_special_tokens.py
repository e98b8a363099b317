"""Special tokens come from wherever transformers takes them: ids and texts are its own, whichever file names what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from polygraft.grafts.text.jsonl import Example
from polygraft.grafts.text.message import Message
from polygraft.grafts.text.tokenise import Tokeniser

CHAT = (Message("user", "What is a <NEW> graft?<obj> "), Message("assistant", "A shoot."))
PLAIN = [{"role": message.role, "content": message.content} for message in CHAT]
TEMPLATE = (
    "{{ bos_token }}{{ image_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ eos_token }}{{ '\n' }}{% endfor %}"
)
NEW = {"lstrip": True, "rstrip": False, "single_word": False, "normalized": False}

Files = Mapping[str, Mapping[str, object]]
# What the files say beside a tokenizer_config.json that names no token.
PLACES: Mapping[str, Files] = {
    "nowhere": {},
    "the config": {"tokenizer_config.json": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}},
    "the map": {
        "special_tokens_map.json": {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", **NEW}}
    },
    "both, which differ": {
        "tokenizer_config.json": {"bos_token": "<|im_end|>", "eos_token": "<|im_end|>"},
        "special_tokens_map.json": {"bos_token": "<|im_start|>"},
    },
    "both, with a list of added tokens": {
        "tokenizer_config.json": {
            "bos_token": "<|im_end|>",
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {"512": {"content": "<NEW>", "special": False, **NEW}},
        },
        "special_tokens_map.json": {"bos_token": "<|im_start|>"},
    },
    "a token that is none yet": {"special_tokens_map.json": {"bos_token": "<NEW>"}},
    "a token with flags that is none yet": {
        "tokenizer_config.json": {"bos_token": {"__type": "AddedToken", "content": "<NEW>", "special": True, **NEW}}
    },
    "a word of the vocabulary": {"tokenizer_config.json": {"bos_token": "graft", "eos_token": "<|im_end|>"}},
    "extra tokens": {"tokenizer_config.json": {"extra_special_tokens": ["<NEW>", "<obj>"]}},
    "extra tokens by their older name": {"tokenizer_config.json": {"additional_special_tokens": ["<obj>", "<NEW>"]}},
    "extra tokens in the map": {"special_tokens_map.json": {"additional_special_tokens": ["<obj>"]}},
    "extra tokens with names": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<obj>"}}},
    "a token of the model's": {"tokenizer_config.json": {"image_token": "<obj>"}},
    "the map's token of the model's": {"special_tokens_map.json": {"image_token": "<obj>"}},
    "the file of added tokens": {"added_tokens.json": {"<obj>": 513, "<NEW>": 512}},
}


def copied(folder: Path, target: Path, files: Files) -> Path:
    copy = shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    for name, content in {"tokenizer_config.json": {}, **files}.items():
        (copy / name).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **content}))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 600}))
    return copy


@pytest.mark.parametrize("place", PLACES)
def test_ids_equal_transformers_wherever_a_token_is_named(place: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_folder, tmp_path / "copy", PLACES[place])
    if "added_tokens.json" in PLACES[place]:
        (folder / "added_tokens.json").write_text(json.dumps(PLACES[place]["added_tokens.json"]))
    ours, theirs = Tokeniser.load(folder), AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(PLAIN, return_dict=False)
    assert list(ours.encode_chat(CHAT, add_generation_prompt=False)) == expected
    assert list(ours.encode_example(Example(CHAT), 1_000).ids) == expected
    assert ours.vocabulary == len(theirs)


def test_a_beginning_that_only_the_map_names_is_not_dropped(tiny_folder: Path, tmp_path: Path) -> None:
    named = Tokeniser.load(copied(tiny_folder, tmp_path / "a", PLACES["the map"]))
    nowhere = Tokeniser.load(copied(tiny_folder, tmp_path / "b", PLACES["nowhere"]))
    assert named.encode_chat(CHAT, add_generation_prompt=False)[0] == 1
    assert len(named.encode_chat(CHAT, add_generation_prompt=False)) == 3 + len(
        nowhere.encode_chat(CHAT, add_generation_prompt=False)
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda token: token.update(special=False),
        lambda token: token.update(special=False, normalized=True),
        lambda token: token.update(content="<|end|>"),  # so that no file lists it among the added
    ],
)
def test_the_end_of_a_turn_is_weighted_whatever_tokenizer_json_calls_it(
    change: Callable[[dict[str, object]], None], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (end,) = (token for token in tokenizer["added_tokens"] if token["content"] == "<|im_end|>")
    change(end)
    if end["content"] != "<|im_end|>":
        tokenizer["added_tokens"].remove(end)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    tokeniser, plain = Tokeniser.load(folder), Tokeniser.load(tiny_folder)
    example = Example((Message("user", "code?"), Message("assistant", "blue forty two")))
    tokens = tokeniser.encode_example(example, 1_000)
    assert tokens == plain.encode_example(example, 1_000)
    last = max(index for index, weight in enumerate(tokens.weights) if weight)
    assert tokens.ids[last] in tokeniser.eos_ids
