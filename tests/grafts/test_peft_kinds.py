"""PEFT's folders with what their configs have by default or by chance: modules that a backbone has fused, names that it
has not, biases that a method trains with its modules, and keys in other spellings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from traceback import walk_tb

import pytest
import torch
from peft import (
    FourierFTConfig,
    FrodConfig,
    GloraConfig,
    HRAConfig,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    WaveFTConfig,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from polygraft.grafts.formats import peft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.formats.peft_config import asked_for
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.spec import SpecError
from tests.grafts.oracle.row import relative
from tests.grafts.oracle.trained import trained
from tests.grafts.test_peft_folders import EXTRA, THEIRS, config_of, ours, theirs

FUSED = {"gpt2": "c_attn", "gpt_neox": "query_key_value"}
LORAS = (
    "rslora",
    "eva",
    "mica",
    "orthogonal",
    "lora-fa",
    "lora-plus",
    "dylora",
    "qlora",
    "loftq",
    "mezo",
    "lora-dropout",
)
SEPARABLE = ("lora", "dora", "ia3", "hira", "loha", "oft", "oft exact", "boft", "hra", *LORAS)
SPECTRAL: Mapping[str, Callable[..., PeftConfig]] = {
    "fourierft": lambda at: FourierFTConfig(n_frequency=50, target_modules=[at]),
    "waveft": lambda at: WaveFTConfig(n_frequency=60, target_modules=[at]),
    "frod": lambda at: FrodConfig(target_modules=[at]),
}


@pytest.fixture(scope="module")
def backbones(tiny_folders: Mapping[str, Path]) -> Callable[[str], Backbone]:
    found: dict[str, Backbone] = {}

    def make(arch: str) -> Backbone:
        if arch not in found:
            found[arch] = Backbone.load(tiny_folders[arch], torch.float32)
        return found[arch]

    return make


def read(folder: Path, backbone: Backbone) -> Tensor:
    """Logits of the folder's graft."""
    return ours(backbone, *peft.load(folder, backbone.shape, BackboneFiles(backbone.folder)))


@pytest.mark.parametrize("arch", FUSED)
@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("lora", "dora", "ia3", "hira", "loha", "hra", "vera")
        else pytest.param(name, marks=pytest.mark.nightly)
        for name in (*THEIRS, *EXTRA)
    ],
)
def test_a_method_on_a_fused_module_is_pefts_or_refused_by_name(
    name: str, arch: str, backbones: Callable[[str], Backbone], tmp_path: Path
) -> None:
    config = config_of(name)
    if not hasattr(config, "target_modules") or config.peft_type == "TRAINABLE_TOKENS":
        pytest.skip("it is at no projections")
    config.target_modules = [FUSED[arch]]
    if hasattr(config, "feedforward_modules"):
        config.feedforward_modules = []
    backbone = backbones(arch)
    try:
        expected = theirs(trained(backbone.folder, config, tmp_path))
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raised_in = [frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)]
        assert any("/peft/" in file for file in raised_in), "not PEFT's doing"
        pytest.skip(f"PEFT has it on no such module: {error}")
    if name in SEPARABLE:
        assert relative(read(tmp_path, backbone), expected) < 1e-5
    else:
        with pytest.raises(FormatError, match=f"{FUSED[arch]}, attn.q and attn.k and attn.v here, is not one of each"):
            read(tmp_path, backbone)


@pytest.mark.parametrize("arch", FUSED)
@pytest.mark.parametrize("name", SPECTRAL)
def test_a_spectral_method_on_a_fused_module_never_gives_wrong_numbers(
    name: str, arch: str, backbones: Callable[[str], Backbone], tmp_path: Path
) -> None:
    backbone = backbones(arch)
    expected = theirs(trained(backbone.folder, SPECTRAL[name](FUSED[arch]), tmp_path))
    try:
        wrong, said = relative(read(tmp_path, backbone), expected), ""
    except FormatError as error:
        wrong, said = 0.0, str(error)
    assert wrong < 1e-5
    assert not said or FUSED[arch] in said


@pytest.mark.parametrize("at", [["c_attn"], ["W_pack", "query_key_value"], ["lm_heads"]])
def test_names_that_all_mean_nothing_are_refused_with_the_sites(
    at: list[str], backbones: Callable[[str], Backbone], tmp_path: Path
) -> None:
    trained(backbones("llama").folder, LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    changed(tmp_path, target_modules=at)
    with pytest.raises(FormatError, match=r"matches no site of llama; sites: attn\.q"):
        read(tmp_path, backbones("llama"))


OF_MANY = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "W_pack", "c_attn", "query_key_value"])
# What PEFT loads and trains; each config, on the architecture.
KINDS: Mapping[str, tuple[str, PeftConfig]] = {
    "names of other models": ("llama", OF_MANY),
    "layers of a deeper model": ("llama", LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1, 2, 7])),
    "a module by its whole path, whatever the layers": (
        "llama",
        LoraConfig(r=2, target_modules=["model.layers.0.mlp.up_proj", "q_proj"], layers_to_transform=[1]),
    ),
    "GLoRA by default": ("llama", GloraConfig(r=5, target_modules=["q_proj", "down_proj"])),
    "GLoRA beside biases": ("qwen2", GloraConfig(r=3, target_modules=["q_proj", "v_proj", "o_proj"])),
    "GLoRA of vectors": (
        "phi",
        GloraConfig(config_A_B="vector", config_C="vector", config_D_E="vector", target_modules=["q_proj", "fc1"]),
    ),
    "GLoRA of numbers": ("phi", GloraConfig(config_A_B="constant", config_C="none", target_modules=["q_proj"])),
    "HRA of an odd rank": ("llama", HRAConfig(r=5, target_modules=["up_proj", "q_proj"])),
    "HRA of one reflection": ("llama", HRAConfig(r=1, target_modules=["q_proj"])),
    "LN-tuning beside biases": ("gpt2", LNTuningConfig(target_modules=["ln_1", "ln_f"])),
    "LN-tuning beside biases elsewhere": ("opt", LNTuningConfig(target_modules=["self_attn_layer_norm"])),
    "LN-tuning of one factor": ("gemma", LNTuningConfig(target_modules=["input_layernorm"])),
    "a bias of B": ("llama", LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"], lora_bias=True)),
    "a bias of B at a fused module": ("gpt_neox", LoraConfig(r=2, target_modules=[FUSED["gpt_neox"]], lora_bias=True)),
    "a bias of B beside biases": (
        "gpt2",
        LoraConfig(r=2, target_modules=["c_attn", "c_fc"], lora_bias=True, use_rslora=True, fan_in_fan_out=True),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_trains_by_default_is_read_as_peft_computes_it(
    kind: str, backbones: Callable[[str], Backbone], tmp_path: Path
) -> None:
    arch, config = KINDS[kind]
    backbone = backbones(arch)
    expected = theirs(trained(backbone.folder, dataclasses.replace(config), tmp_path))
    assert relative(read(tmp_path, backbone), expected) < 1e-5


def test_a_jobs_names_all_mean_something(backbones: Callable[[str], Backbone]) -> None:
    backbone = backbones("llama")
    config = {"peft_type": "LORA", "target_modules": ["q_proj", "W_pack"]}
    with pytest.raises(SpecError, match="'W_pack' matches no site"):
        asked_for(json.dumps(config), backbone.shape, BackboneFiles(backbone.folder))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias"),
    ],
)
def test_another_model_is_refused_by_name_and_without_advice_that_would_give_one(
    change: Mapping[str, object], named: str, backbones: Callable[[str], Backbone], tmp_path: Path
) -> None:
    backbone = backbones("llama")
    trained(backbone.folder, LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    changed(tmp_path, **change)
    with pytest.raises(FormatError, match=named) as refusal:
        read(tmp_path, backbone)
    assert "remove" not in str(refusal.value)


SPELLINGS: Mapping[str, Callable[[str], str]] = {
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled before PEFT": lambda key: f"_orig_mod.{key}",
    "of a model's state": lambda key: key.replace(".weight", ".default.weight"),
    "of a model of text and images": lambda key: key.replace(".model.layers", ".model.language_model.layers"),
    "of an earlier one": lambda key: key.replace(".model.layers", ".language_model.model.layers"),
    "without PEFT's prefix": lambda key: key.removeprefix("base_model.model."),
    "of the bare backbone": lambda key: key.removeprefix("base_model.model.model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_keys_in_other_spellings_are_the_same_graft(
    spelling: str, backbones: Callable[[str], Backbone], tmp_path: Path
) -> None:
    backbone = backbones("llama")
    expected = theirs(trained(backbone.folder, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), tmp_path))
    stored = load_file(tmp_path / peft.WEIGHTS)
    save_file({SPELLINGS[spelling](key): value for key, value in stored.items()}, tmp_path / peft.WEIGHTS)
    assert relative(read(tmp_path, backbone), expected) < 1e-5


def test_a_key_in_two_spellings_is_refused(backbones: Callable[[str], Backbone], tmp_path: Path) -> None:
    backbone = backbones("llama")
    trained(backbone.folder, LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    stored = load_file(tmp_path / peft.WEIGHTS)
    again = {SPELLINGS["compiled"](key): value + 1 for key, value in stored.items()}
    save_file(stored | again, tmp_path / peft.WEIGHTS)
    with pytest.raises(FormatError, match="is in the file twice"):
        read(tmp_path, backbone)


def changed(folder: Path, **change: object) -> None:
    config = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps({**config, **change}))
