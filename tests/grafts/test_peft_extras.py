"""PEFT folders of what was trained in addition to the method, whole modules and biases: read, and written again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native, peft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.grammar import parse
from polygraft.grafts.methods.registry import layouts
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.launch.demo.oracle.peft_oracle import loaded
from polygraft.launch.demo.oracle.plain import plain_model
from tests.grafts.oracle.row import random_tensors, relative
from tests.grafts.oracle.table import ALL
from tests.grafts.oracle.trained import trained
from tests.grafts.test_peft import IDS, logits


def lora(*at: str, r: int = 2, **fields: object) -> LoraConfig:
    return LoraConfig(r=r, target_modules=[*at], **fields)  # type: ignore[arg-type]


READ = {
    "modules": ("llama", lora("q_proj", modules_to_save=["o_proj", "input_layernorm", "norm"])),
    "one module": ("llama", lora("q_proj", modules_to_save=["layers.1.mlp.up_proj"], use_dora=True)),
    "a module that is a target, too": ("llama", lora("q_proj", "o_proj", modules_to_save=["o_proj"])),
    "fused modules": ("gpt2", lora("mlp.c_fc", modules_to_save=["c_attn", "ln_1"], fan_in_fan_out=True)),
    "all biases": ("gpt2", lora("mlp.c_fc", bias="all", fan_in_fan_out=True)),
    "all biases, one of the head": ("phi", lora("q_proj", bias="none", modules_to_save=["layers.0.mlp.fc1"])),
    "biases of the method's modules": ("qwen2", lora("q_proj", "o_proj", bias="lora_only")),
    "a norm with its bias": ("gpt2", lora("mlp.c_fc", modules_to_save=["ln_1"], bias="lora_only", fan_in_fan_out=True)),
    "a projection with its bias": (
        "gpt2",
        lora("attn.c_proj", modules_to_save=["mlp.c_fc"], bias="lora_only", fan_in_fan_out=True),
    ),
    "modules and all biases": (
        "gpt2",
        lora("attn.c_proj", modules_to_save=["ln_1", "c_attn"], bias="all", fan_in_fan_out=True),
    ),
    "a module without others and all biases": ("qwen2", lora("q_proj", modules_to_save=["k_proj", "norm"], bias="all")),
    "norms whose factor is one more": ("gemma", lora("v_proj", modules_to_save=["norm"])),
    "more at some": ("opt", lora("fc1", "k_proj", rank_pattern={"fc1": 3}, modules_to_save=["out_proj"], bias="all")),
}
FUSED = {  # whose methods stand at parts of modules here
    "all biases with a fused module": ("gpt2", lora("c_attn", bias="all", fan_in_fan_out=True)),
    "a norm with one": ("gpt2", lora("c_attn", modules_to_save=["ln_1"], bias="lora_only", fan_in_fan_out=True)),
}


@pytest.mark.parametrize("name", [*READ, *FUSED])
def test_what_was_trained_in_addition_to_the_method_comes_along_and_is_written_again(
    name: str, tiny_folders: Mapping[str, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    arch, config = (READ | FUSED)[name]
    backbone = Backbone.load(tiny_folders[arch], torch.float32)
    model = trained(backbone.folder, config, tmp_path)
    expected = model(input_ids=IDS[None]).logits[0]
    graft, values = peft.load(tmp_path, backbone.shape, BackboneFiles(backbone.folder))
    assert relative(logits(backbone, graft, values), expected) < 1e-5
    with pytest.raises(FormatError, match=r"modules_to_save, bias: .* name the backbone's folder"):
        peft.load(tmp_path, backbone.shape)
    if name in FUSED:
        with pytest.raises(FormatError, match="no target_modules of gpt2 mean just"):
            peft.export(tmp_path, graft, values, backbone_files=BackboneFiles(backbone.folder))
        return
    (again := tmp_path / "again").mkdir()
    peft.export(again, graft, values, backbone_files=BackboneFiles(backbone.folder))
    same(*(load_file(folder / peft.WEIGHTS) for folder in (tmp_path, again)))
    before, after = (json.loads((folder / peft.CONFIG).read_text()) for folder in (tmp_path, again))
    assert before["bias"] == after["bias"] and bool(before["modules_to_save"]) == bool(after["modules_to_save"])
    recwarn.clear()
    assert relative(loaded(backbone.folder, again, torch.float32)(input_ids=IDS[None]).logits[0], expected) < 1e-5
    assert not [str(w.message) for w in recwarn if "key" in str(w.message)]  # "Found missing adapter keys"
    back = peft.load(again, backbone.shape, BackboneFiles(backbone.folder))
    assert back[0].spec.slots == graft.spec.slots
    same(values, back[1])


def same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """The method's tensors bit for bit, the others but for the rounding of W + dW to float32."""
    assert after.keys() == before.keys()
    for key, value in before.items():
        method = "lora" in key or key.rpartition(".")[2] in "ABm"
        torch.testing.assert_close(after[key], value, rtol=0.0 if method else 1e-6, atol=0.0 if method else 1e-6)


WRITTEN = {
    "lora(r=2, at=attn.q) + ln-tuning + child-tuning(at=attn.o)@1": (
        "llama",
        {"modules_to_save": ["input_layernorm", "post_attention_layernorm", "layers.1.self_attn.o_proj", "norm"]},
    ),
    "ln-tuning(at=norm.final) + dora(r=2)": ("llama", {"modules_to_save": ["model.norm"], "bias": "none"}),
    "ia3 + ln-tuning(at=norm.1)@0": ("gemma", {"modules_to_save": ["layers.0.input_layernorm"]}),
    "ln-tuning(at=norm.1) + child-tuning(at=attn.o)": (
        "llama",
        {"peft_type": "LN_TUNING", "modules_to_save": ["o_proj"]},
    ),
    "bitfit(at=attn.q) + lora(r=2, at=attn.q|attn.o)": ("qwen2", {"modules_to_save": None, "bias": "lora_only"}),
    "vera(r=4, at=ffn.up) + beft + bitfit(at=attn.[qk])": ("qwen2", {"modules_to_save": None, "bias": "all"}),
    "lora(r=2, at=ffn.up) + ssf(at=norm.1)@1 + child-tuning(at=attn.[qkv]) + bitfit(at=attn.[qkv])": (
        "gpt2",
        {"modules_to_save": ["c_attn", "h.1.ln_1"], "bias": "none"},
    ),
    "lora(r=2, at=attn.q) + bitfit(at=linear|norm.*)": ("phi", {"bias": "all"}),
    "lora(r=2, at=attn.q) + bitfit(at=linear|norm.*) ": ("opt", {"bias": "all"}),
    "pissa(r=2, at=attn.q) + ln-tuning + vera(r=2, at=attn.q)": ("llama", {"peft_type": "LORA", "r": 6}),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_a_union_that_changes_whole_modules_and_biases_is_a_folder_of_peft(
    text: str, tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    arch, fields = WRITTEN[text]
    backbone = Backbone.load(tiny_folders[arch], torch.float32)
    graft = BoundGraft(parse(text), backbone.shape)
    values = modest(graft)
    found, back = assert_a_folder_of_peft(graft, values, backbone, tmp_path, fields, tolerance=1e-5)  # type: ignore[arg-type]
    if "pissa" not in text:
        by_place = [
            {(t.site, t.part): kept[t.name] for t in one.tensors} for one, kept in ((graft, values), (found, back))
        ]
        assert by_place[0].keys() == by_place[1].keys()
        for place, value in by_place[0].items():
            torch.testing.assert_close(by_place[1][place], value, rtol=1e-6, atol=1e-6)


def assert_a_folder_of_peft(
    graft: BoundGraft,
    values: Mapping[str, Tensor],
    backbone: Backbone,
    folder: Path,
    fields: Mapping[str, object],
    *,
    tolerance: float,
) -> tuple[BoundGraft, Mapping[str, Tensor]]:
    """Saved, a graft has these fields in its config, is the same function in PEFT, which saves the same tensors, and
    read again; what was read is returned."""
    backbone_files, dtype = BackboneFiles(backbone.folder), backbone.dtype
    saved = native.save(folder, graft, values, backbone=backbone.fingerprint, backbone_files=backbone_files)
    config = json.loads((folder / saved / peft.CONFIG).read_text())
    assert {key: config[key] for key in fields} == fields
    expected = logits(backbone, graft, values)  # type: ignore[arg-type]
    theirs = loaded(backbone.folder, folder / saved, dtype)
    with torch.inference_mode():
        assert relative(theirs(input_ids=IDS[None]).logits[0], expected) < tolerance
    theirs.save_pretrained(str(folder / "theirs"))
    files = [load_file(one / peft.WEIGHTS) for one in (folder / saved, folder / "theirs")]
    assert files[0].keys() == files[1].keys() and all(files[0][key].equal(files[1][key]) for key in files[0])
    found, back = peft.load(folder / saved, backbone.shape, backbone_files)
    assert relative(logits(backbone, found, back), expected) < tolerance
    return found, back


def modest(graft: BoundGraft) -> dict[str, Tensor]:
    """Random tensors, but for the dice that are thrown in training alone."""
    found = {name: value.float() for name, value in random_tensors(graft, seed=4).items()}
    return {name: value.zero_() if name.endswith("_dice") else value for name, value in found.items()}


@pytest.mark.parametrize(
    ("arch", "text", "message"),
    [
        ("llama", "lora + bitfit", r"PEFT has no bitfit at 0.attn.k \(bias 'none'\)"),
        ("qwen2", "lora + bitfit(at=attn.v)", r"PEFT has no bitfit at 0.attn.v \(bias 'none'\)"),
        ("qwen2", "lora + bitfit(at=attn.[qk])", r"PEFT trains bitfit at 0.attn.v, too \(bias 'lora_only'\)"),
        ("qwen2", "lora(at=attn.o) + bitfit(at=attn.[qkvo])", r"PEFT has no bitfit at 0.attn.o \(bias 'all'\)"),
        ("qwen2", "lora(at=attn.o) + child-tuning(at=attn.q)", "PEFT trains bitfit at 0.attn.q, too"),
        ("qwen2", "ia3 + bitfit(at=attn.[qkv])", r"PEFT has no bitfit at 0.attn.k \(bias 'none'\)"),
        ("gpt2", "lora(at=ffn.up) + ln-tuning", "PEFT has no ln-tuning at 0.norm.1"),
        ("gpt2", "lora(at=ffn.up) + child-tuning(at=attn.q)", "PEFT trains bitfit at 0.attn.q, too"),
        ("llama", "lora(at=attn.q) + ssf(at=norm.1)", "PEFT trains ln-tuning at 0.norm.1, too"),
        ("llama", "lora + child-tuning(at=attn.q)", "either the method or a whole model.layers.0.self_attn.q_proj"),
        ("llama", "prefix(3) + ln-tuning", "are not written with PREFIX_TUNING"),
        ("llama", "lora(at=attn.q) + ssf(at=attn.o)", "has no equal in PEFT"),
        ("llama", "lora(at=attn.q) + lt-sft(at=attn.o)", "has no equal in PEFT"),
        ("llama", "lora + child-tuning(at=attn.o) + child-tuning(at=attn.o)", "has no equal in PEFT"),
        ("llama", "bitfit + ln-tuning", "has no equal in PEFT"),
    ],
)
def test_what_no_config_of_peft_means_is_refused_by_name(
    arch: str, text: str, message: str, tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    backbone = Backbone.load(tiny_folders[arch], torch.float32)
    backbone_files = BackboneFiles(backbone.folder)
    graft = BoundGraft(parse(text), backbone.shape)
    assert not peft.exportable(graft, backbone_files)
    with pytest.raises(FormatError, match=message):
        peft.export(tmp_path, graft, modest(graft), backbone_files=backbone_files)
    assert not list(tmp_path.iterdir())


def test_biases_are_trained_with_the_methods_whose_configs_in_peft_have_the_field() -> None:
    for layout in layouts():
        fields = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[layout.kind])}  # type: ignore[index]
        if layout.sides:
            assert ("bias" in fields, "modules_to_save" in fields) == (layout.biases, True), layout.kind


KINDS = {layout.kind for layout in layouts() if layout.sides and layout.biases} - {"BOFT"}  # which needs CUDA


@pytest.mark.parametrize("bias", ["all", "only"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_biases_come_along_with_every_such_method(
    kind: str, bias: str, tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    backbone = Backbone.load(tiny_folders["qwen2"], torch.float32)
    rows = [row.config for row in ALL.values() if row.config is not None]
    config = next(found for make in rows if (found := make()).peft_type.value == kind)  # type: ignore[union-attr]
    word = "all" if bias == "all" else f"{kind.lower()}_only"
    stated = {"save_indices": True} if kind == "UNILORA" else {}
    config = dataclasses.replace(config, bias=word, target_modules=["q_proj"], **stated)  # type: ignore[arg-type,call-arg]
    expected = trained(backbone.folder, config, tmp_path)(input_ids=IDS[None]).logits[0]
    graft, values = peft.load(tmp_path, backbone.shape, backbone_files := BackboneFiles(backbone.folder))
    assert any(slot.op == "affine" for slot in graft.spec.slots)
    assert relative(logits(backbone, graft, values), expected) < 1e-5
    (again := tmp_path / "again").mkdir()
    peft.export(again, graft, values, backbone_files=backbone_files)
    assert relative(loaded(backbone.folder, again, torch.float32)(input_ids=IDS[None]).logits[0], expected) < 1e-5


def test_a_bias_that_no_site_has_is_the_backbones(tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    backbone = Backbone.load(tiny_folders["phi"], torch.float32)
    get_peft_model(plain_model(backbone.folder, torch.float32), lora("q_proj", bias="all")).save_pretrained(tmp_path)  # type: ignore[arg-type]
    stored, backbone_files = load_file(tmp_path / peft.WEIGHTS), BackboneFiles(backbone.folder)
    peft.load(tmp_path, backbone.shape, backbone_files)
    stored["base_model.model.lm_head.bias"] += 1
    save_file(stored, tmp_path / peft.WEIGHTS)
    with pytest.raises(FormatError, match=r"lm_head\.bias: is not the backbone's, and no op of ours changes it"):
        peft.load(tmp_path, backbone.shape, backbone_files)


def test_a_bias_that_is_said_twice_is_the_same(tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    """With bias="all" PEFT writes those of modules_to_save three times: as trained, twice, and as they were."""
    backbone = Backbone.load(tiny_folders["gpt2"], torch.float32)
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["ln_1"], bias="all", fan_in_fan_out=True)
    get_peft_model(plain_model(backbone.folder, torch.float32), config).save_pretrained(str(tmp_path))
    stored, backbone_files = load_file(tmp_path / peft.WEIGHTS), BackboneFiles(backbone.folder)
    key = "base_model.model.transformer.h.0.ln_1"
    assert {f"{key}.bias", f"{key}.modules_to_save.bias", f"{key}.original_module.bias"} <= stored.keys()
    expected = logits(backbone, *peft.load(tmp_path, backbone.shape, backbone_files))
    stored[f"{key}.original_module.bias"] += 1
    save_file(stored, tmp_path / peft.WEIGHTS)
    assert torch.equal(logits(backbone, *peft.load(tmp_path, backbone.shape, backbone_files)), expected)
    stored[f"{key}.modules_to_save.bias"] += 1
    save_file(stored, tmp_path / peft.WEIGHTS)
    with pytest.raises(FormatError, match=r"ln_1\.modules_to_save\.bias: is not .*ln_1\.bias"):
        peft.load(tmp_path, backbone.shape, backbone_files)
