"""PEFT folders of LoRAs with rows of the embeddings edited in addition: read, and written again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native, peft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.grammar import parse
from polygraft.grafts.methods.registry import layouts
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.launch.demo.oracle.peft_oracle import loaded
from tests.grafts.oracle.row import random_tensors, relative
from tests.grafts.oracle.trained import trained
from tests.grafts.test_peft import IDS, logits
from tests.grafts.test_peft_extras import assert_a_folder_of_peft, modest
from tests.tiny import tiny_llama

FIELD = "trainable_token_indices"
DELTA = "token_adapter.trainable_tokens_delta"
EMBED, HEAD = f"base_model.model.model.embed_tokens.{DELTA}", f"base_model.model.lm_head.{DELTA}"


@pytest.fixture(scope="module")
def folders(tiny_folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    untied = tiny_llama(tmp_path_factory.mktemp("untied"), tied=False)
    config = AutoConfig.from_pretrained(tiny_folders["bert"], tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForMaskedLM.from_config(config).save_pretrained(bert := tmp_path_factory.mktemp("bert"))
    return {"untied llama": untied, "untied bert": bert, **{arch: tiny_folders[arch] for arch in TIED | OTHERS}}


def lora(*at: str, tokens: object, **fields: object) -> LoraConfig:
    return LoraConfig(r=2, target_modules=[*at], trainable_token_indices=tokens, **fields)  # type: ignore[arg-type]


def both(embedding: str, *ids: int, head: int = 5) -> Mapping[str, list[int]]:
    return {embedding: [*ids], "lm_head": [head]}


TIED = {"llama", "gemma", "gpt2", "opt"}
OTHERS = {"mistral", "phi", "gpt_neox", "bert", "t5"}
READ = {
    "tokens": ("untied llama", lora("q_proj", tokens=[17, 42])),
    "tokens of a named module": ("untied llama", lora("q_proj", tokens={"embed_tokens": [0]}, use_dora=True)),
    "a module named by its path": ("mistral", lora("down_proj", tokens={"model.embed_tokens": [511, 8, 3]})),
    "a head with a bias": ("phi", lora("q_proj", tokens=[300], bias="lora_only")),
    "modules and biases, too": ("gpt_neox", lora("dense_h_to_4h", tokens=[5, 99], modules_to_save=["attention.dense"])),
    "adalora": ("untied llama", AdaLoraConfig(total_step=10, target_modules=["v_proj"], trainable_token_indices=[42])),
    "a tied head that stays": ("llama", lora("q_proj", "o_proj", tokens=both("embed_tokens", 17, 42))),
    "one that is told so first": ("llama", lora("q_proj", tokens={"lm_head": [17], "embed_tokens": [17, 42]})),
    "scaled embeddings": ("gemma", lora("v_proj", tokens=both("embed_tokens", 17, 300), modules_to_save=["norm"])),
    "an encoder": ("untied bert", lora("query", tokens={"word_embeddings": [300, 42]})),
    "with a fused one": ("gpt2", lora("mlp.c_fc", tokens=both("transformer.wte", 42), fan_in_fan_out=True)),
    "with biases": ("opt", lora("fc1", tokens=both("decoder.embed_tokens", 8, 99, head=99), bias="all")),
}


@pytest.mark.parametrize("name", READ)
def test_edited_rows_come_along_and_are_written_again(
    name: str, folders: Mapping[str, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    arch, config = READ[name]
    backbone, backbone_files = Backbone.load(folders[arch], torch.float64), BackboneFiles(folders[arch])
    model = trained(backbone.folder, config, first := tmp_path / "first")
    if arch in TIED:
        keep_head(model, first)
    expected = logits_of(backbone, first)
    graft, values = peft.load(first, backbone.shape, backbone_files)
    assert [slot.op for slot in graft.spec.slots].count("tokens") == 1
    exact = config.bias == "none" and not config.modules_to_save  # else W + dW is rounded to float32
    assert relative(logits(backbone, graft, values), expected) < (1e-9 if exact else 1e-6)
    with pytest.raises(FormatError, match="name the backbone's folder"):
        peft.load(first, backbone.shape)
    (again := tmp_path / "again").mkdir()
    peft.export(again, graft, values, backbone_files=backbone_files)
    before, after = (load_file(folder / peft.WEIGHTS) for folder in (first, again))
    same = [key for key in before if "lora" in key or (key.endswith(DELTA) and "lm_head" not in key)]
    assert before.keys() == after.keys() and all(before[key].equal(after[key]) for key in same)
    recwarn.clear()
    assert relative(logits_of(backbone, again), expected) < (1e-9 if exact else 1e-6)
    assert not [str(w.message) for w in recwarn if "key" in str(w.message)]  # "Found missing adapter keys"
    back, kept = peft.load(again, backbone.shape, backbone_files)
    assert back.spec.slots == graft.spec.slots
    assert all(kept[key].allclose(value, atol=1e-6) for key, value in values.items())


def keep_head(model: PeftModel, folder: Path) -> None:
    """Save it again with the head's row as it was before training."""
    with torch.no_grad():
        adapter = model.get_submodule("base_model.model.lm_head.token_adapter")
        adapter.trainable_tokens_delta["default"].copy_(adapter.trainable_tokens_original["default"])  # type: ignore[index]
    model.save_pretrained(str(folder))


def logits_of(backbone: Backbone, folder: Path) -> Tensor:
    with torch.inference_mode():
        found: Tensor = loaded(backbone.folder, folder, torch.float64)(input_ids=IDS[None]).logits[0]
    return found


WRITTEN = {
    "lora(r=2, at=attn.q) + trainable-tokens(17|42)": ("untied llama", {FIELD: [17, 42]}),
    "trainable-tokens(42) + dora(r=2)": ("untied llama", {FIELD: [42], "use_dora": True}),
    "pissa(r=2, at=attn.q) + textual-inversion(8)": ("phi", {FIELD: [8], "r": 4}),
    "adalora(r=2, target=1, at=ffn.up) + trainable-tokens(8)": ("gpt_neox", {"peft_type": "ADALORA", FIELD: [8]}),
    "lora(r=2, at=attn.q) + trainable-tokens(17|0)": (
        "llama",
        {"peft_type": "LORA", FIELD: {"model.embed_tokens": [17, 0], "lm_head": [0]}},
    ),
    "rslora(r=2) + trainable-tokens(0) + ln-tuning": (
        "gemma",
        {FIELD: {"model.embed_tokens": [0], "lm_head": [1]}, "bias": "none"},
    ),
    "lora(r=2, at=attn.o) + trainable-tokens(300|5)": ("gpt2", {FIELD: {"transformer.wte": [300, 5], "lm_head": [0]}}),
    "rslora(r=2, at=attn.o) + trainable-tokens(99)": (
        "opt",
        {FIELD: {"model.decoder.embed_tokens": [99], "lm_head": [0]}},
    ),
    "lora(r=2, at=attn.q) + trainable-tokens(5)": ("untied bert", {FIELD: [5]}),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_a_union_with_trainable_tokens_is_a_folder_of_peft(
    text: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    arch, fields = WRITTEN[text]
    backbone = Backbone.load(folders[arch], torch.float64)
    graft = BoundGraft(parse(text), backbone.shape)
    assert_a_folder_of_peft(graft, modest(graft), backbone, tmp_path, fields, tolerance=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arch", "text", "message"),
    [
        ("untied llama", "vera(r=2, at=attn.q) + trainable-tokens(3)", f"{FIELD}: is not written with VERA"),
        ("untied llama", "prefix(3) + trainable-tokens(3)", f"{FIELD}: is not written with PREFIX_TUNING"),
        (
            "untied llama",
            "ln-tuning(at=norm.1) + trainable-tokens(3)",
            f"{FIELD}: is not written with LN_TUNING",
        ),
        ("untied llama", "trainable-tokens(3) + ln-tuning", "are not written with TRAINABLE_TOKENS"),
        ("untied llama", "lora + prompt(3) + trainable-tokens(3)", "has no equal in PEFT"),
        ("bert", "lora + trainable-tokens(3)", "PEFT edits the head tied to the embeddings, too"),
        ("t5", "lora + trainable-tokens(3)", "both stacks of t5 read what PEFT edits for neither"),
        ("llama", "trainable-tokens(3)", "PEFT edits the head tied to the embeddings, too"),
    ],
)
def test_edits_that_no_config_means_are_not_written(
    arch: str, text: str, message: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    backbone, backbone_files = Backbone.load(folders[arch], torch.float32), BackboneFiles(folders[arch])
    graft = BoundGraft(parse(text), backbone.shape)
    assert not peft.exportable(graft, backbone_files)
    with pytest.raises(FormatError, match=message):
        peft.export(tmp_path, graft, modest(graft), backbone_files=backbone_files)
    assert not list(tmp_path.iterdir())


ENDS = {"llama": "q_proj", "untied llama": "q_proj", "gpt2": "c_attn", "bert": "query", "t5": "q"}


@pytest.mark.parametrize(
    ("arch", "tokens", "message"),
    [
        ("llama", [17], "PEFT edits the head tied to the embeddings, too"),
        ("llama", both("embed_tokens", 17, head=17), "PEFT edits the head tied to the embeddings, too"),
        ("llama", both("embed_tokens", 17, head=3), f"{HEAD}: is not the backbone's, and no op of ours edits a head"),
        ("llama", {"lm_head": [3]}, "names no tokens of 'model.embed_tokens'"),
        ("untied llama", both("embed_tokens", 17), "'lm_head' is not 'model.embed_tokens', and no op edits rows"),
        ("gpt2", {"wpe": [3]}, "'wpe' is not 'transformer.wte'"),
        ("bert", [17], "PEFT edits the head tied to the embeddings, too"),
        ("t5", [17], "both stacks of t5 read what PEFT edits for neither"),
        ("untied llama", [17, 17], "different tokens"),
    ],
)
def test_edits_that_no_op_makes_are_not_read(
    arch: str, tokens: object, message: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    trained(folders[arch], lora(ENDS[arch], tokens=tokens), tmp_path)
    backbone_files = BackboneFiles(folders[arch])
    with pytest.raises(FormatError, match=message):
        peft.load(tmp_path, backbone_files.shape, backbone_files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({FIELD: {"embed_tokens": [3, 4], "model.embed_tokens": [5]}}, "'model.embed_tokens' is not"),
        ({FIELD: [3, 4]}, rf"{EMBED}: shape \(1, 64\) is not \(2, 64\)"),
        ({FIELD: [512]}, "512 is not a token of this backbone"),
        ({FIELD: [True]}, "is not a list of tokens"),
        ({FIELD: [-1]}, "is not a list of tokens"),
        ({FIELD: 3}, "is not a list of tokens"),
        ({FIELD: {"embed_tokens": []}}, "is not a list of tokens"),
        ({FIELD: None}, f"{EMBED}.* are missing or unknown"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"peft_type": "LOHA"}, FIELD),
    ],
)
def test_a_field_that_does_not_fit_is_refused(
    change: Mapping[str, object], message: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    backbone_files = BackboneFiles(folders["untied llama"])
    trained(folders["untied llama"], lora("q_proj", tokens=[3]), tmp_path)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    (tmp_path / peft.CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(FormatError, match=message):
        peft.load(tmp_path, backbone_files.shape, backbone_files)


def test_rows_that_are_not_there_and_a_head_past_the_vocabulary_are_refused(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    backbone_files = BackboneFiles(folders["llama"])
    model = trained(folders["llama"], lora("q_proj", tokens=both("embed_tokens", 17)), tmp_path)
    keep_head(model, tmp_path)
    config, stored = json.loads((tmp_path / peft.CONFIG).read_text()), load_file(tmp_path / peft.WEIGHTS)
    peft.load(tmp_path, backbone_files.shape, backbone_files)
    save_file({key: value for key, value in stored.items() if key != HEAD}, tmp_path / peft.WEIGHTS)
    with pytest.raises(FormatError, match=f"{HEAD}: is missing"):
        peft.load(tmp_path, backbone_files.shape, backbone_files)
    save_file(stored, tmp_path / peft.WEIGHTS)
    (tmp_path / peft.CONFIG).write_text(json.dumps({**config, FIELD: both("embed_tokens", 17, head=512)}))
    with pytest.raises(FormatError, match="512 is not a token of this backbone; it has 512"):
        peft.load(tmp_path, backbone_files.shape, backbone_files)


def test_rows_are_edited_with_the_methods_whose_configs_in_peft_have_the_field() -> None:
    for layout in layouts():
        fields = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[layout.kind])}  # type: ignore[index]
        assert (FIELD in fields) == layout.edits_tokens, layout.kind


def test_a_head_whose_bias_peft_leaves_out_is_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """Its forward of a head with edited rows has none; Phi's has one, tied or not."""
    shutil.copytree(folders["phi"], folder := tmp_path / "tied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    trained(folder, lora("q_proj", tokens=both("embed_tokens", 17)), graft := tmp_path / "graft")
    backbone_files = BackboneFiles(folder)
    with pytest.raises(FormatError, match="PEFT computes a head that it edits without its bias"):
        peft.load(graft, backbone_files.shape, backbone_files)
    bound = BoundGraft(parse("lora(r=2, at=attn.q) + trainable-tokens(17)"), backbone_files.shape)
    with pytest.raises(FormatError, match="PEFT computes a head that it edits without its bias"):
        peft.export(tmp_path / "ours", bound, random_tensors(bound, seed=1), backbone_files=backbone_files)


def test_a_folder_may_edit_most_of_the_vocabulary(folders: Mapping[str, Path], tmp_path: Path) -> None:
    backbone_files, ids = BackboneFiles(folders["untied llama"]), [*range(1, 512)]
    trained(folders["untied llama"], lora("q_proj", tokens=ids), tmp_path)
    graft, values = peft.load(tmp_path, backbone_files.shape, backbone_files)
    saved = native.save(tmp_path / "ours", graft, values, backbone="stock", backbone_files=backbone_files)
    assert json.loads((tmp_path / "ours" / saved / peft.CONFIG).read_text())[FIELD] == ids
    found = native.load(tmp_path / "ours" / saved, shape=backbone_files.shape, backbone="stock")
    assert found.graft == graft and all(found.tensors[name].equal(value) for name, value in values.items())
