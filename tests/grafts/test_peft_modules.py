"""Every way in which PEFT's configs say which modules a method is at, and what single ones have otherwise, read and
written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import (
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    HiraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    WaveFTConfig,
)
from safetensors.torch import load_file

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import peft
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.launch.demo.oracle.peft_oracle import loaded
from tests.grafts.oracle.row import LINEAR, random_tensors, relative
from tests.grafts.oracle.trained import trained
from tests.grafts.test_peft import IDS, logits

SORTED = ["k_proj", "o_proj", "q_proj", "v_proj", "down_proj", "gate_proj", "up_proj"]


def lora(*at: str, r: int = 2, **fields: object) -> LoraConfig:
    return LoraConfig(r=r, target_modules=[*at], **fields)  # type: ignore[arg-type]


# The config, its meaning, and the fields that we write for that.
WAYS: Mapping[str, tuple[str, PeftConfig, str, Mapping[str, object]]] = {
    "all-linear": (
        "llama",
        LoraConfig(r=2, target_modules="all-linear"),
        "lora(r=2, alpha=8, at=linear)",
        {"target_modules": SORTED, "layers_to_transform": None},
    ),
    "a pattern": (
        "llama",
        LoraConfig(r=2, target_modules=r".*\.[01]\..*\.(q|v)_proj"),
        "lora(r=2, alpha=8, at=attn.q|attn.v)",
        {"target_modules": ["q_proj", "v_proj"]},
    ),
    "other modules in every layer": (
        "llama",
        LoraConfig(r=2, target_modules=r"model\.layers\.(0\.mlp\.up_proj|1\.self_attn\.q_proj)"),
        "lora(r=2, alpha=8, at=ffn.up)@0 + lora(r=2, alpha=8, at=attn.q)@1",
        {"target_modules": r"(model\.layers\.(0)\.(mlp\.up_proj)|model\.layers\.(1)\.(self_attn\.q_proj))"},
    ),
    "ranks and alphas": (
        "llama",
        lora(
            "q_proj",
            "v_proj",
            "up_proj",
            rank_pattern={"v_proj": 4, r"layers\.1\.mlp\.up_proj": 3},
            alpha_pattern={"^model.layers.1.self_attn.v_proj": 5},
        ),
        "lora(r=2, alpha=8, at=attn.q) + lora(r=4, alpha=8, at=attn.v)@0 + lora(r=2, alpha=8, at=ffn.up)@0"
        " + lora(r=4, alpha=5, at=attn.v)@1 + lora(r=3, alpha=8, at=ffn.up)@1",
        {},
    ),
    "the first pattern that fits": (
        "llama",
        lora(
            "q_proj",
            rank_pattern={r"\d\.self_attn\.q_proj": 5, "q_proj": 3},
            alpha_pattern={".*q_proj": 4, "q_proj": 6},
        ),
        "lora(r=5, alpha=4, at=attn.q)",
        {"r": 5, "lora_alpha": 4, "target_modules": ["q_proj"]},
    ),
    "ranks that mean no module": (
        "llama",
        lora("q_proj", rank_pattern={"proj": 5, "layers.1": 6}, alpha_pattern={"_proj": 3}),
        "lora(r=2, alpha=8, at=attn.q)",
        {"r": 2, "lora_alpha": 8},
    ),
    "ranks of rsLoRA": (
        "llama",
        lora("q_proj", "o_proj", use_rslora=True, rank_pattern={"o_proj": 9}, alpha_pattern={"o_proj": 3}),
        "rslora(r=2, alpha=8, at=attn.q) + rslora(r=9, alpha=3, at=attn.o)",
        {
            "use_rslora": True,
            "rank_pattern": {r"layers\.(\d+)\.(self_attn\.o_proj)": 9},
            "alpha_pattern": {r"layers\.(\d+)\.(self_attn\.o_proj)": 3},
        },
    ),
    "ranks of DoRA": (
        "llama",
        lora("q_proj", "down_proj", use_dora=True, rank_pattern={"0.mlp.down_proj": 4}),
        "dora(r=2, alpha=8, at=attn.q) + dora(r=4, alpha=8, at=ffn.down)@0 + dora(r=2, alpha=8, at=ffn.down)@1",
        {"use_dora": True},
    ),
    "ranks of LoHa": (
        "llama",
        LoHaConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 5}),
        "loha(r=2, alpha=5, at=attn.q) + loha(r=3, alpha=8, at=attn.v)",
        {},
    ),
    "ranks of LoKr": (
        "llama",
        LoKrConfig(
            r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, alpha_pattern={"1.*q_proj": 5}
        ),
        "lokr(r=2, alpha=8, at=attn.q)@0 + lokr(r=3, alpha=8, at=attn.v) + lokr(r=2, alpha=5, at=attn.q)@1",
        {},
    ),
    "ranks of HiRA, which PEFT passes over": (
        "llama",
        HiraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, layers_to_transform=[0]),
        "hira(r=2, at=attn.[qv])@0",
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]},
    ),
    "bounds and ranks of DeLoRA": (
        "llama",
        DeloraConfig(
            r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, lambda_pattern={"layers.0.*v_proj": 5}
        ),
        "delora(r=2, at=attn.q) + delora(r=3, bound=5, at=attn.v)@0 + delora(r=3, at=attn.v)@1",
        {"r": 2},
    ),
    "counts of FourierFT": (
        "llama",
        FourierFTConfig(n_frequency=20, target_modules=["q_proj", "v_proj"], n_frequency_pattern={"v_proj": 30}),
        "fourierft(n=20, at=attn.q) + fourierft(n=30, at=attn.v)",
        {"n_frequency": 20, "n_frequency_pattern": {r"layers\.(\d+)\.(self_attn\.v_proj)": 30}},
    ),
    "counts of WaveFT": (
        "llama",
        WaveFTConfig(
            n_frequency=20,
            target_modules=["q_proj", "v_proj"],
            n_frequency_pattern={"1.self_attn.v_proj": 30},
            wavelet_family="db1",
        ),
        "waveft(n=20, at=attn.q) + waveft(n=20, at=attn.v)@0 + waveft(n=30, at=attn.v)@1",
        {"n_frequency": 20, "n_frequency_pattern": {r"layers\.(1)\.(self_attn\.v_proj)": 30}},
    ),
    "blocks of C3A": (
        "llama",
        C3AConfig(block_size=16, target_modules=["q_proj", "o_proj"], block_size_pattern={"o_proj": 32}),
        "c3a(block=16, at=attn.q) + c3a(block=32, at=attn.o)",
        {"block_size": 16, "block_size_pattern": {r"layers\.(\d+)\.(self_attn\.o_proj)": 32}},
    ),
    "excluded": (
        "llama",
        lora(*LINEAR, exclude_modules=["q_proj"], layers_to_transform=[1], use_rslora=True),
        "rslora(r=2, alpha=8, at=attn.[kvo]|ffn.*)@1",
        {"target_modules": [name for name in SORTED if name != "q_proj"], "layers_to_transform": [1]},
    ),
    "excluded by a pattern": (
        "llama",
        LoraConfig(r=2, target_modules=r".*_proj", exclude_modules=r".*\.(mlp\..*|[kvo]_proj)"),
        "lora(r=2, alpha=8, at=attn.q)",
        {"target_modules": ["q_proj"]},
    ),
    "excluded in a layer": (
        "llama",
        lora("v_proj", exclude_modules=["model.layers.0.self_attn.v_proj", "proj"]),
        "lora(r=2, alpha=8, at=attn.v)@1",
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    ),
    "a layer": (
        "llama",
        lora("o_proj", layers_to_transform=0),
        "lora(r=2, alpha=8, at=attn.o)@0",
        {"target_modules": ["o_proj"], "layers_to_transform": [0]},
    ),
    "layers by the name of their list": (
        "llama",
        lora("o_proj", layers_to_transform=[0], layers_pattern="layers"),
        "lora(r=2, alpha=8, at=attn.o)@0",
        {"target_modules": ["o_proj"], "layers_to_transform": [0]},
    ),
    "layers of one of several lists": (
        "gpt2",
        lora("mlp.c_proj", layers_to_transform=[1], layers_pattern=["layers", "h"], fan_in_fan_out=True),
        "lora(r=2, alpha=8, at=ffn.down)@1",
        {"target_modules": ["mlp.c_proj"], "layers_to_transform": [1], "fan_in_fan_out": True},
    ),
    "ranks where modules have parts of one name": (
        "gpt2",
        lora("c_proj", rank_pattern={"attn.c_proj": 3}, alpha_pattern={"h.1.mlp.c_proj": 7}, fan_in_fan_out=True),
        "lora(r=3, alpha=8, at=attn.o) + lora(r=2, alpha=8, at=ffn.down)@0 + lora(r=2, alpha=7, at=ffn.down)@1",
        {},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_name_modules_means_what_it_means_in_peft(
    way: str, tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    arch, config, text, _ = WAYS[way]
    backbone = Backbone.load(tiny_folders[arch], torch.float32)
    expected = trained(backbone.folder, config, tmp_path)(input_ids=IDS[None]).logits[0]
    graft, values = peft.load(tmp_path, backbone.shape)
    assert placed(graft) == placed(BoundGraft(parse(text), backbone.shape))
    assert relative(logits(backbone, graft, values), expected) < 1e-5
    (again := tmp_path / "again").mkdir()
    peft.export(again, graft, values)
    theirs = loaded(backbone.folder, again, torch.float32)
    assert relative(theirs(input_ids=IDS[None]).logits[0], expected) < 1e-5
    before, after = (load_file(folder / peft.WEIGHTS) for folder in (tmp_path, again))
    assert before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before)


@pytest.mark.parametrize("way", WAYS)
def test_a_union_of_one_method_is_written_in_as_few_words_and_comes_back(
    way: str, tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    arch, _, text, fields = WAYS[way]
    backbone = Backbone.load(tiny_folders[arch], torch.float32)
    graft = BoundGraft(parse(text), backbone.shape)
    values = random_tensors(graft, seed=4)
    peft.export(tmp_path, graft, values)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    assert {key: config[key] for key in fields} == fields
    expected = logits(backbone, graft, values)
    theirs = loaded(backbone.folder, tmp_path, torch.float32)
    assert relative(theirs(input_ids=IDS[None]).logits[0], expected) < 1e-5
    found, back = peft.load(tmp_path, backbone.shape)
    assert placed(found) == placed(graft)
    assert relative(logits(backbone, found, back), expected) < 1e-6


def placed(graft: BoundGraft) -> set[tuple[str, str]]:
    """What the slots do at each site."""
    slots = graft.spec.slots
    said = (asdict(slots[index]) | {"at": str(site), "layers": None} for index, site in graft.sites)
    return {(one["at"], json.dumps(one, sort_keys=True)) for one in said}
