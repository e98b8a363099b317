"""PEFT's folders with embeddings or a head in the file: read as PEFT computes with them, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from polygraft.grafts.formats import peft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.spec import SpecError
from polygraft.launch.demo.oracle.peft_oracle import loaded
from polygraft.launch.demo.oracle.plain import plain_model
from tests.grafts.oracle.row import relative
from tests.grafts.oracle.trained import trained
from tests.grafts.test_peft_folders import ours, theirs
from tests.tiny import tiny_llama

E, H = "base_model.model.model.embed_tokens", "base_model.model.lm_head"


@pytest.fixture(scope="module")
def backbones(
    tiny_folder: Path, tiny_folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Backbone]:
    untied = tiny_llama(tmp_path_factory.mktemp("untied"), tied=False)
    places = {"tied": tiny_folder, "untied": untied, "gemma": tiny_folders["gemma"], "neox": tiny_folders["gpt_neox"]}
    return {name: Backbone.load(place, torch.float32) for name, place in places.items()}


def agree(folder: Path, backbone: Backbone) -> bool:
    """Whether our logits are those of PEFT's model as a user loads the folder."""
    graft, values = peft.load(folder, backbone.shape, BackboneFiles(backbone.folder))
    return relative(ours(backbone, graft, values), theirs(loaded(backbone.folder, folder, torch.float32))) < 1e-5


def lora(**fields: object) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], **fields})  # type: ignore[arg-type]


READ: Mapping[str, tuple[str, Callable[[], LoraConfig]]] = {
    "saved embeddings": ("untied", lambda: lora(modules_to_save=["embed_tokens"])),
    "saved embeddings of a tied model": ("tied", lambda: lora(modules_to_save=["embed_tokens", "input_layernorm"])),
    "saved embeddings by their path": ("untied", lambda: lora(modules_to_save=["model.embed_tokens"])),
    "a LoRA on the embeddings": ("untied", lambda: lora(target_modules=["q_proj", "embed_tokens"])),
    "one of a tied model": ("tied", lambda: lora(target_modules=["q_proj", "embed_tokens"], use_rslora=True)),
    "one of a rank of its own": (
        "untied",
        lambda: lora(
            target_modules=["v_proj", "embed_tokens"], rank_pattern={"embed_tokens": 5}, alpha_pattern={"embed.*": 3}
        ),
    ),
    "one of scaled embeddings": ("gemma", lambda: lora(target_modules=["q_proj", "embed_tokens"])),
    "saved embeddings that are scaled": ("gemma", lambda: lora(modules_to_save=["embed_tokens"])),
    "saved embeddings of another name": ("neox", lambda: lora(target_modules=["dense"], modules_to_save=["embed_in"])),
}


@pytest.mark.parametrize("case", READ)
def test_trained_embeddings_are_read_as_peft_computes_with_them(
    case: str, backbones: Mapping[str, Backbone], tmp_path: Path
) -> None:
    name, config = READ[case]
    trained(backbones[name].folder, config(), tmp_path)
    assert agree(tmp_path, backbones[name])


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_tables_that_are_only_kept_change_nothing(name: str, backbones: Mapping[str, Backbone], tmp_path: Path) -> None:
    model = trained(backbones[name].folder, lora(), tmp_path)
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    assert f"{E}.weight" in load_file(tmp_path / peft.WEIGHTS)
    assert agree(tmp_path, backbones[name])
    graft, _ = peft.load(tmp_path, backbones[name].shape, BackboneFiles(backbones[name].folder))
    assert [slot.op for slot in graft.spec.slots] == ["branch"]


def test_rows_of_a_kept_table_that_were_trained_are_edits(backbones: Mapping[str, Backbone], tmp_path: Path) -> None:
    changed(tmp_path, backbones["untied"], [f"{E}.weight"])
    assert agree(tmp_path, backbones["untied"])
    graft, values = peft.load(tmp_path, backbones["untied"].shape, BackboneFiles(backbones["untied"].folder))
    assert "trainable-tokens(ids=3-5|42)" in graft.spec.method
    assert values["1.0.embed.p"].shape == (4, 64)


def changed(folder: Path, backbone: Backbone, keys: list[str], rows: int | None = None) -> None:
    """A LoRA's folder with tables in which a few rows differ, or with more `rows`."""
    trained(backbone.folder, lora(), folder)
    backbone_files, tables = BackboneFiles(backbone.folder), {}
    for key in keys:
        table = backbone_files.wide(
            "model.embed_tokens.weight" if backbone_files.tied else key.removeprefix("base_model.model.")
        )
        table[[3, 4, 5, 42]] += 0.5
        tables[key] = table if rows is None else torch.cat([table, table])[:rows].clone()
    save_file(load_file(folder / peft.WEIGHTS) | tables, folder / peft.WEIGHTS)


@pytest.mark.parametrize(
    ("name", "keys", "rows", "words"),
    [
        ("untied", [f"{H}.weight"], None, "lm_head.weight: is not the backbone's, and no op of ours changes a head"),
        ("tied", [f"{E}.weight"], None, "lm_head.weight: is not the backbone's, and no op of ours changes a head"),
        ("untied", [f"{E}.weight"], 520, "embed_tokens.weight: 520 tokens, and the backbone has 512"),
        ("untied", [f"{E}.weight"], 510, "embed_tokens.weight: 510 tokens, and the backbone has 512"),
        ("untied", [f"{E}.weight", f"{H}.weight"], 520, "520 tokens, and the backbone has 512"),
    ],
)
def test_what_no_op_of_ours_changes_is_refused_by_name(
    name: str, keys: list[str], rows: int | None, words: str, backbones: Mapping[str, Backbone], tmp_path: Path
) -> None:
    changed(tmp_path, backbones[name], keys, rows)
    with pytest.raises(FormatError, match=words) as refusal:
        agree(tmp_path, backbones[name])
    assert "fold the folder into its model" in str(refusal.value)  # the same model


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: lora(target_modules=["q_proj", "lm_head"]), "lm_head.lora_A.weight: no op of ours changes a head"),
        (lambda: lora(modules_to_save=["lm_head"]), "lm_head.weight: is not the backbone's"),
        (lambda: lora(target_modules=["q_proj", "embed_tokens"], use_dora=True), "dora of the embeddings is not read"),
    ],
)
def test_a_trained_head_is_refused_by_name(
    config: Callable[[], LoraConfig], words: str, backbones: Mapping[str, Backbone], tmp_path: Path
) -> None:
    trained(backbones["untied"].folder, config(), tmp_path)
    with pytest.raises(FormatError, match=words):
        agree(tmp_path, backbones["untied"])


def test_a_saved_head_that_was_not_trained_is_passed_over(backbones: Mapping[str, Backbone], tmp_path: Path) -> None:
    model = get_peft_model(plain_model(backbones["untied"].folder, torch.float32), lora(modules_to_save=["lm_head"]))
    model.save_pretrained(str(tmp_path))
    assert agree(tmp_path, backbones["untied"])


@pytest.mark.parametrize("ids", ["3-", "-3", "5-3-1", "0-99999999999", "1|0-9999999", "a-b"])
def test_what_is_no_range_of_tokens_is_refused(ids: str) -> None:
    with pytest.raises(SpecError, match="ids"):
        parse(f"trainable-tokens(ids={ids})")
