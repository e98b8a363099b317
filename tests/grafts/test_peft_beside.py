"""PEFT folders of what was trained beside the method: whole modules and biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from polygraft.cluster.launch.demo.oracle.plain import plain_model
from polygraft.grafts.formats import peft
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.formats.stock import Stock
from polygraft.grafts.runtime.backbone import Backbone
from tests.grafts.oracle.row import relative
from tests.grafts.test_peft import IDS, logits


@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("llama", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj", "input_layernorm", "norm"])),
        ("llama", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["layers.1.mlp.up_proj"], use_dora=True)),
        ("gpt2", LoraConfig(r=2, target_modules=["mlp.c_fc"], modules_to_save=["c_attn", "ln_1"], fan_in_fan_out=True)),
        ("gpt2", LoraConfig(r=2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)),
        ("qwen2", LoraConfig(r=2, target_modules=["q_proj", "o_proj"], bias="lora_only")),
        ("gpt2", LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["ln_1"], bias="lora_only")),
        ("gpt2", LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["mlp.c_fc"], bias="lora_only")),
        ("gpt2", LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["ln_1", "mlp.c_fc"], bias="all")),
        ("qwen2", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["k_proj", "norm"], bias="all")),
    ],
    ids=[
        "modules",
        "one module",
        "fused modules",
        "all biases",
        "biases of the method's modules",
        "a norm with its bias",
        "a projection with its bias",
        "modules and all biases",
        "a module without others and all biases",
    ],
)
def test_what_was_trained_beside_the_method_comes_along(
    arch: str, config: LoraConfig, tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    backbone = Backbone.load(tiny_folders[arch], torch.float32)
    model = get_peft_model(plain_model(backbone.folder, torch.float32), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(str(tmp_path))
        expected = model(input_ids=IDS[None]).logits[0]
    found = peft.load(tmp_path, backbone.shape, Stock(backbone.folder))
    assert relative(logits(backbone, *found), expected) < 1e-5
    with pytest.raises(FormatError, match="modules_to_save, bias: .* name the backbone's folder"):
        peft.load(tmp_path, backbone.shape)


def test_a_bias_that_is_said_twice_is_the_same(tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    """With bias="all" PEFT writes those of modules_to_save three times: as trained, twice, and as they were."""
    backbone = Backbone.load(tiny_folders["gpt2"], torch.float32)
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["ln_1"], bias="all", fan_in_fan_out=True)
    get_peft_model(plain_model(backbone.folder, torch.float32), config).save_pretrained(str(tmp_path))
    stored, stock = load_file(tmp_path / peft.WEIGHTS), Stock(backbone.folder)
    key = "base_model.model.transformer.h.0.ln_1"
    assert {f"{key}.bias", f"{key}.modules_to_save.bias", f"{key}.original_module.bias"} <= stored.keys()
    expected = logits(backbone, *peft.load(tmp_path, backbone.shape, stock))
    stored[f"{key}.original_module.bias"] += 1
    save_file(stored, tmp_path / peft.WEIGHTS)
    assert torch.equal(logits(backbone, *peft.load(tmp_path, backbone.shape, stock)), expected)
    stored[f"{key}.modules_to_save.bias"] += 1
    save_file(stored, tmp_path / peft.WEIGHTS)
    with pytest.raises(FormatError, match=r"ln_1\.modules_to_save\.bias: is not .*ln_1\.bias"):
        peft.load(tmp_path, backbone.shape, stock)
