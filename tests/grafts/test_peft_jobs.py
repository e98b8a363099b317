"""PEFT configs that jobs give in place of a union: they train what PEFT's model of the config trains."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native, peft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.peft_config import asked_for
from polygraft.grafts.grammar import learning_rate, parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.spec import Branch, GraftSpec, Norm, SpecError
from tests.grafts.oracle.row import random_tensors
from tests.grafts.oracle.trained import trained
from tests.trainers.test_packed_equals_alone import a_job, assert_as_alone, pack_of, run

LLAMA = {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj", "q_proj"]}


@pytest.fixture(scope="module")
def backbone_files(tiny_folder: Path) -> BackboneFiles:
    return BackboneFiles(tiny_folder)


def asked(config: Mapping[str, object], backbone_files: BackboneFiles) -> GraftSpec:
    return asked_for(json.dumps(config), backbone_files.shape, backbone_files)


def alike(found: GraftSpec, text: str, backbone_files: BackboneFiles) -> bool:
    """Whether two grafts are the same slots at the same sites, whatever words say where."""
    spec = parse(text)
    slots = [{replace(slot, at="", layers=None) for slot in one.slots} for one in (found, spec)]
    bound = [BoundGraft(one, backbone_files.shape).tensors for one in (found, spec)]
    layouts = [{(t.site, t.part, t.shape, t.start, t.trained) for t in found} for found in bound]
    return slots[0] == slots[1] and layouts[0] == layouts[1] and found.hooks == spec.hooks


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "lora(r=8, alpha=8)"),
        (LLAMA, "lora(r=4, alpha=6, at=q_proj|v_proj)"),
        ({**LLAMA, "use_rslora": True, "lora_dropout": 0.1}, "rslora(r=4, alpha=6, at=q_proj|v_proj, dropout=0.1)"),
        ({**LLAMA, "use_dora": True, "layers_to_transform": [0, 1]}, "dora(r=4, alpha=6, at=q_proj|v_proj)@0,1"),
        ({**LLAMA, "layers_to_transform": 1}, "lora(r=4, alpha=6, at=q_proj|v_proj)@1"),
        ({"peft_type": "IA3"}, "ia3"),
        ({"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"]}, "ia3(at=k_proj, feedforward=down_proj)"),
        (
            {"peft_type": "IA3", "target_modules": ["k_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
            "ia3(at=k_proj, feedforward=up_proj)",
        ),
        ({"peft_type": "IA3", "target_modules": "k_proj", "feedforward_modules": []}, "ia3(at=k_proj, feedforward=)"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 7, "token_dim": 64, "num_layers": 2}, "prefix(7)"),
        (
            {"peft_type": "PREFIX_TUNING", "prefix_projection": True, "encoder_hidden_size": 9},
            "prefix-mlp(20, hidden=9)",
        ),
        ({"peft_type": "P_TUNING", "num_virtual_tokens": 7, "encoder_hidden_size": 9}, "p-tuning(7, hidden=9)"),
        ({**LLAMA, "init_lora_weights": "pissa"}, "pissa(r=4, alpha=6, at=q_proj|v_proj)"),
        ({"peft_type": "VERA", "r": 16, "target_modules": ["q_proj"]}, "vera(r=16, at=q_proj)"),
        ({"peft_type": "OFT", "use_cayley_neumann": False, "target_modules": "q_proj"}, "oft(neumann=0, at=q_proj)"),
        ({"peft_type": "MISS", "init_weights": "bat", "r": 8, "target_modules": "all-linear"}, "bat(8, at=all-linear)"),
    ],
)
def test_a_peft_config_means_what_it_means_in_peft(
    config: dict[str, object], text: str, backbone_files: BackboneFiles
) -> None:
    found = asked(config, backbone_files)
    assert alike(found, text, backbone_files)
    assert parse(found.method).slots == found.slots


def test_dora_with_a_rank_stabilised_scale_keeps_it(backbone_files: BackboneFiles) -> None:
    branch, norm = asked({**LLAMA, "use_dora": True, "use_rslora": True}, backbone_files).slots
    assert isinstance(branch, Branch) and isinstance(norm, Norm)
    assert branch.scale == pytest.approx(6 / sqrt(4), rel=1e-15)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "XLORA"}, ["'XLORA'", "choices: ADALORA, ADAMSS, ADAPTION_PROMPT, ", "VERA"]),
        ({"rank": 4}, ["{'rank': 4}", "Fields: ", "lora_alpha", " r,"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
        ({"bias": "some"}, ["bias: 'some'"]),
        ({"peft_type": "LOHA", "bias": "all"}, ["{'bias': 'all'}"]),
        ({**LLAMA, "trainable_token_indices": [3]}, ["trainable_token_indices", "head tied", "(got [3])"]),
        ({**LLAMA, "trainable_token_indices": {"lm_head": [3]}}, ["trainable_token_indices"]),
        ({"peft_type": "IA3", "trainable_token_indices": [3]}, ["trainable_token_indices", "[3]"]),
        ({"init_lora_weights": "corda"}, ["corda"]),
        ({**LLAMA, "rank_pattern": {"q_proj": "x"}}, ["rank_pattern", "'x'"]),
        ({**LLAMA, "rank_pattern": 3}, ["rank_pattern", "3"]),
        ({**LLAMA, "target_modules": ["lm_head"]}, ["target_modules: 'lm_head'", "sites: attn.q"]),
        ({"r": "many"}, ["lora.r", "'many'"]),
        ({"r": 0}, ["rank: 0"]),
        ({"layers_to_transform": "0"}, ["layers_to_transform: '0'"]),
        ({"layers_to_transform": []}, ["layers_to_transform: []"]),
        ({"layers_to_transform": [True]}, ["layers_to_transform: [True]"]),
        ({"layers_to_transform": [-1]}, ["layers_to_transform: [-1]"]),
        ({"peft_type": "WAVEFT", "wavelet_family": "db2"}, ["wavelet_family: 'db2'", "WAVEFT", "'db1'"]),
        ({"peft_type": "VERA", "projection_prng_key": 3}, ["projection_prng_key"]),
    ],
)
def test_a_peft_field_that_is_not_read_is_refused(
    config: dict[str, object], words: list[str], backbone_files: BackboneFiles
) -> None:
    with pytest.raises(SpecError) as caught:
        asked(config, backbone_files)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["not JSON at character 1"]),
        ('{"a":' + "[" * 1900, ["not JSON", "recursion"]),
        ('{"a":' + "[" * 40 + "]" * 40 + "}", ["a: lists and objects lie in each other more than 32 deep"]),
        ('{"auto_mapping": 1e999}', ["auto_mapping: is a number past"]),
        (r'{"auto_mapping": "\ud800"}', ["auto_mapping: holds half of a surrogate pair"]),
    ],
)
def test_text_that_is_no_config_is_named(text: str, words: list[str], backbone_files: BackboneFiles) -> None:
    with pytest.raises(SpecError) as caught:
        asked_for(text, backbone_files.shape, backbone_files)
    for word in words:
        assert word in str(caught.value)


def test_what_peft_itself_writes_beside_is_passed_over(backbone_files: BackboneFiles) -> None:
    notes = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "x", "inference_mode": True, "bias": "none"}
    empty: dict[str, object] = {
        "alpha_pattern": {},
        "modules_to_save": None,
        "init_lora_weights": True,
        "megatron_core": "megatron.core",
    }
    assert asked({**LLAMA, **notes, **empty}, backbone_files) == asked(LLAMA, backbone_files)


def test_a_config_starts_from_its_methods_rate(backbone_files: BackboneFiles) -> None:
    assert learning_rate(asked({"peft_type": "IA3"}, backbone_files)) == learning_rate(parse("ia3"))


def lora(*at: str, r: int = 2, **fields: object) -> LoraConfig:
    return LoraConfig(r=r, target_modules=[*at], **fields)  # type: ignore[arg-type]


BESIDE: Mapping[str, tuple[str, PeftConfig]] = {
    "other ranks": ("llama", lora("q_proj", "v_proj", rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 5})),
    "another rank of one layer": ("llama", lora("q_proj", "up_proj", rank_pattern={"layers.1.self_attn.q_proj": 6})),
    "modules": ("llama", lora("q_proj", modules_to_save=["o_proj", "input_layernorm", "norm"])),
    "a module that is a target, too": ("llama", lora("q_proj", "o_proj", modules_to_save=["o_proj"], use_dora=True)),
    "fused modules": ("gpt2", lora("mlp.c_fc", modules_to_save=["c_attn", "ln_1"], fan_in_fan_out=True)),
    "all biases": ("gpt2", lora("mlp.c_fc", bias="all", fan_in_fan_out=True)),
    "biases of the method's modules": ("qwen2", lora("q_proj", "o_proj", bias="lora_only")),
    "tokens": ("mistral", lora("v_proj", trainable_token_indices=[3, 77])),
    "all of it": (
        "mistral",
        lora("k_proj", "up_proj", rank_pattern={"k_proj": 3}, modules_to_save=["norm"], trainable_token_indices=[5]),
    ),
    "adalora's biases": ("qwen2", AdaLoraConfig(total_step=100, target_modules=["q_proj"], bias="all")),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_job_trains_what_the_folder_of_the_same_config_holds(
    name: str, tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    """Slot by slot that of the folder, and as many numbers as PEFT trains."""
    arch, config = BESIDE[name]
    files = BackboneFiles(tiny_folders[arch])
    model = trained(tiny_folders[arch], config, tmp_path)
    of_folder, _ = peft.load(tmp_path, files.shape, files)
    said = json.loads((tmp_path / peft.CONFIG).read_text())
    of_job = asked({key: value for key, value in said.items() if value is not None}, files)
    assert (of_job.slots, of_job.method) == (of_folder.spec.slots, of_folder.spec.method)
    theirs = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert BoundGraft(of_job, files.shape).parameters == theirs


# What the ingress does with a config and with the folder of a graft that a job is made over, in a process like its own.
WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = None
from pathlib import Path
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.description import described
from polygraft.grafts.formats.peft_config import asked_for
for folder, text in json.loads(sys.argv[1]):
    own = BackboneFiles(Path(folder))
    print(asked_for(text, own.shape, own).method)
print(described(Path(sys.argv[2])).method)
"""


def test_a_jobs_graft_is_read_where_there_is_no_torch(tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    asks: list[tuple[str, str]] = []
    for arch, config in BESIDE.values():
        config.save_pretrained(str(tmp_path))
        said = json.loads((tmp_path / peft.CONFIG).read_text())
        asks.append((str(tiny_folders[arch]), json.dumps({key: v for key, v in said.items() if v is not None})))
    files = [BackboneFiles(Path(folder)) for folder, _ in asks]
    wanted = [asked_for(text, own.shape, own).method for (_, text), own in zip(asks, files, strict=True)]
    bound = BoundGraft(parse("lora(r=2)"), files[0].shape)
    source = tmp_path / native.save(tmp_path, bound, random_tensors(bound, seed=1), backbone="b")
    told = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(asks), str(source)]
    done = subprocess.run(told, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [*wanted, "lora(r=2)"], done.stderr


def test_such_jobs_train_in_a_pack_as_alone(tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    files = BackboneFiles(tiny_folders["mistral"])
    backbone = Backbone.load(tiny_folders["mistral"], torch.float32, training=True)
    configs = [config for arch, config in BESIDE.values() if arch == "mistral"]
    jobs = []
    for seed, config in enumerate(configs):
        config.save_pretrained(str(tmp_path))
        said = json.loads((tmp_path / peft.CONFIG).read_text())
        spec = asked({key: value for key, value in said.items() if value is not None}, files)
        job = a_job(f"job {seed}", "lora", seed=seed, steps=3)
        begun = [replace(s, ids=(3, 77, 5, *s.ids), weights=(0.0, 0.0, 0.0, *s.weights)) for s in job.train]
        jobs.append(replace(job, graft=BoundGraft(spec, files.shape), train=tuple(begun)))
    pack = pack_of(backbone, jobs)
    before = {job.id: {n: v.clone() for n, v in pack.jobs[job.id].slab.views.items()} for job in jobs}
    running = dict(pack.jobs)
    assert_as_alone(run(pack), jobs, backbone)
    for job in jobs:
        for name, value in running[job.id].slab.views.items():
            assert not value.equal(before[job.id][name]), f"{name} was not trained"
