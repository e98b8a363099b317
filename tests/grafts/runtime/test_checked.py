"""A backbone's folder is refused, by the names of the tensors, where its files and its config are not of one model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.checked import BackboneError, checked
from tests.tiny import CONFIGS, tiny_llama

Q = "model.layers.1.self_attn.q_proj.weight"
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture
def folder(untied: Path, tmp_path: Path) -> Path:
    return shutil.copytree(untied, tmp_path / "model")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def split(folder: Path, *, twice: bool = False) -> None:
    """The tensors in two files, q_proj of layer 1 in the first or in both, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first = {name: tensor for name, tensor in tensors.items() if name == Q}
    save_file(first, folder / "a.safetensors", metadata={"format": "pt"})
    second = {name: tensor for name, tensor in tensors.items() if twice or name != Q}
    save_file(second, folder / "b.safetensors", metadata={"format": "pt"})
    weights = {name: "a.safetensors" if name in first else "b.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))


@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_a_folder_of_every_architecture_is_taken(arch: str, tiny_folders: Mapping[str, Path]) -> None:
    assert checked(tiny_folders[arch]) == tiny_folders[arch]


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("bert", "bert.pooler.dense.weight"),
        ("bert", "cls.seq_relationship.weight"),
        ("bert", "bert.embeddings.position_ids"),
        ("roberta", "roberta.pooler.dense.bias"),
        ("vit", "vit.pooler.dense.weight"),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
    ],
)
def test_what_files_of_the_hub_hold_and_nothing_reads_is_no_stranger(
    arch: str, name: str, tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folders[arch], tmp_path / "model")
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(2, 2)}))
    assert checked(folder) == folder


def test_a_folder_in_parts_is_taken(folder: Path) -> None:
    split(folder)
    assert checked(folder) == folder
    Backbone.load(folder)


WRONG: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "no head": (lambda f: rewrite(f, lambda t: t.pop(HEAD)), f"has no {HEAD}, which its config.json asks for"),
    "no q_proj": (lambda f: rewrite(f, lambda t: t.pop(Q)), f"has no {Q}, which"),
    "one layer fewer": (
        lambda f: configure(f, num_hidden_layers=3),
        r"has no model.layers.2.input_layernorm.weight, (\S+, ){3}\S+ and 4 more, which its config.json asks for",
    ),
    "one layer more": (
        lambda f: configure(f, num_hidden_layers=1),
        r"holds model.layers.1.input_layernorm.weight, (\S+, ){3}\S+ and 4 more, of which its config.json knows",
    ),
    "a stranger": (
        lambda f: rewrite(f, lambda t: t.update({"model.extra.weight": torch.zeros(2)})),
        "holds model.extra.weight, of which its config.json knows nothing",
    ),
    "another shape": (
        lambda f: rewrite(f, lambda t: t.update({Q: torch.zeros(64, 32)})),
        rf"{Q} is \[64, 32\] in the files, \[64, 64\] by config.json",
    ),
    "another vocabulary": (
        lambda f: configure(f, vocab_size=600),
        r"lm_head.weight is \[512, 64\] in the files, \[600, 64\] by config.json",
    ),
    "bytes for weights": (
        lambda f: rewrite(f, lambda t: t.update({Q: torch.zeros(64, 64, dtype=torch.uint8)})),
        f"{Q} hold U8; convert the model to bf16 or float32",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_are_not_the_configs_are_named(name: str, folder: Path) -> None:
    change, message = WRONG[name]
    change(folder)
    with pytest.raises(BackboneError, match=message):
        checked(folder)
    if name != "bytes for weights":  # which are numbers, if not those of a model
        with pytest.raises(BackboneError, match=message):
            Backbone.load(folder, torch.float32)


def test_a_file_that_was_cut_off_is_named(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(BackboneError, match=r"model.safetensors is not a whole safetensors file"):
        checked(folder)


def test_a_part_that_is_lost_is_named(folder: Path) -> None:
    split(folder)
    (folder / "a.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"has no a.safetensors, which model.safetensors.index.json names"):
        checked(folder)


def test_a_tensor_in_two_parts_is_named(folder: Path) -> None:
    split(folder, twice=True)
    with pytest.raises(BackboneError, match=f"{re.escape(Q)} lies in two files"):
        checked(folder)


def test_a_model_that_was_saved_in_4_bit_is_refused(untied: Path, tmp_path: Path) -> None:
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(untied, quantization_config=asked)
    shutil.copytree(untied, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"is quantised \(quantization_config: 'bitsandbytes'.*--quantise nf4"):
        checked(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"and 9 more hold U8; convert the model to bf16 or float32"):
        checked(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "model_type: 'mamba' has no site table; supported: bert, gemma"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic' makes a row's angles"),
        ({"hidden_size": "wide"}, "hidden_size: 'wide' is not an integer"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "is quantised .*'compressed-tensors'"),
        ({"num_key_value_heads": 3}, "transformers cannot make its model|in the files"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_with_its_field(
    fields: Mapping[str, object], message: str, folder: Path
) -> None:
    configure(folder, **fields)
    with pytest.raises(BackboneError, match=message):
        checked(folder)


def test_a_config_that_is_no_object_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(BackboneError, match=r"config.json cannot be read"):
        checked(folder)


def test_an_adapter_beside_the_model_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BackboneError, match="give the model alone, and its adapter to `polygraft grafts import`"):
        checked(folder)
