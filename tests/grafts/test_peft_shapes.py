"""PEFT folders with tensors of other shapes than the backbone's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from polygraft.grafts.formats import peft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.launch.demo.oracle.plain import plain_model


@pytest.mark.parametrize("kept", [["ln_1"], ["mlp.c_fc"], []], ids=["norm", "projection", "biases"])
def test_a_tensor_beside_the_method_of_any_other_shape_is_an_error(
    kept: list[str], tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    backbone = Backbone.load(tiny_folders["gpt2"], torch.float32)
    bias = "lora_only" if kept else "all"
    config = LoraConfig(
        r=2,
        target_modules=["attn.c_proj"],
        modules_to_save=kept or None,
        bias=bias,  # type: ignore[arg-type]
        fan_in_fan_out=True,
    )
    get_peft_model(plain_model(backbone.folder, torch.float32), config).save_pretrained(str(tmp_path))
    stored, backbone_files = load_file(tmp_path / peft.WEIGHTS), BackboneFiles(backbone.folder)
    peft.load(tmp_path, backbone.shape, backbone_files)
    for key, value in stored.items():
        for odd in (value.sum(), value[:1].clone(), value[None], torch.cat([value, value]), value[..., None]):
            save_file(stored | {key: odd.contiguous()}, tmp_path / peft.WEIGHTS)
            with pytest.raises(FormatError, match=r"shape|dimension"):
                peft.load(tmp_path, backbone.shape, backbone_files)
