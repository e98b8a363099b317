"""What leaves the house: a LoRA in place of any graft that changes weights, and whole models with a graft inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import merged, peft
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.formats.to_lora import to_lora
from polygraft.grafts.grammar import parse
from polygraft.grafts.merge import Fold
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.spec import SpecError
from polygraft.launch.demo.oracle.peft_oracle import loaded
from tests.grafts.oracle.row import random_tensors, relative
from tests.grafts.test_merge import EVERY, unmerged
from tests.tiny import tiny_llama

IDS = torch.arange(3, 22)


@pytest.fixture(scope="module")
def fp32(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float32)


@pytest.mark.parametrize(("name", "rank"), [("vera", 8), ("rslora", 4), ("lora", 8)])
def test_a_graft_of_low_rank_is_a_lora_to_the_last_digit(name: str, rank: int, fp32: Backbone) -> None:
    row = EVERY[name]
    values = {tensor: value.float() for tensor, value in row.values(fp32.shape, seed=2).items()}
    found = to_lora(row.graft(fp32.shape), values, fp32.weight, energy=1.0)
    assert found.loss < 1e-9
    assert {slot.rank for slot in found.graft.spec.slots if slot.op == "branch"} == {rank}
    mine, its = (sorted({site for _, site in graft.sites}) for graft in (row.graft(fp32.shape), found.graft))
    assert its == mine
    expected = unmerged(row.graft(fp32.shape), values, fp32, IDS)
    assert relative(unmerged(found.graft, found.tensors, fp32, IDS), expected) < 1e-5


def test_the_loss_is_that_of_the_best_approximation(fp32: Backbone) -> None:
    graft = BoundGraft(parse("loha(r=4, at=attn.q|ffn.down)"), fp32.shape)  # of rank 16
    values = random_tensors(graft, seed=3)
    found = to_lora(graft, values, fp32.weight, rank=5)
    own, its = Fold(graft, values, fp32.weight), Fold(found.graft, found.tensors, fp32.weight)
    lost = whole = 0.0
    for site in own.sites:
        W, dW = fp32.weight(site).double(), own.at(site).weight.double() - fp32.weight(site).double()
        lost += float((dW - (its.at(site).weight.double() - W)).square().sum())
        whole += float(dW.square().sum())
    assert found.loss == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert 0.01 < found.loss < 0.9
    assert to_lora(graft, values, fp32.weight, rank=16).loss < 1e-9


def test_the_energy_kept_is_the_energy_asked_for_at_every_site(fp32: Backbone) -> None:
    graft = BoundGraft(parse("loha(r=4, at=attn.q)"), fp32.shape)
    values = random_tensors(graft, seed=4)
    found = to_lora(graft, values, fp32.weight, energy=0.9)
    (slot,) = found.graft.spec.slots
    assert slot.op == "branch" and 1 < slot.rank < 16 and found.loss**2 <= 0.1
    assert to_lora(graft, values, fp32.weight, rank=slot.rank - 1).loss > found.loss


def test_peft_loads_what_was_a_loha(fp32: Backbone, tmp_path: Path) -> None:
    graft = BoundGraft(parse("loha(r=2)"), fp32.shape)
    values = random_tensors(graft, seed=5)
    found = to_lora(graft, values, fp32.weight, rank=4)
    peft.export(tmp_path, found.graft, found.tensors)
    logits = loaded(fp32.folder, tmp_path, torch.float32)(input_ids=IDS[None]).logits[0]
    assert relative(logits, unmerged(graft, values, fp32, IDS)) < 1e-5


@pytest.mark.parametrize(
    ("text", "arguments", "wrong"),
    [
        ("lora + bitfit", {"rank": 2}, "changes the bias of 0.attn"),
        ("lora", {}, "give one of the two"),
        ("lora", {"rank": 0}, "rank: 0"),
        ("lora", {"energy": 1.5}, "energy: 1.5"),
    ],
)
def test_what_a_lora_cannot_be_is_refused(text: str, arguments: dict[str, float], wrong: str, fp32: Backbone) -> None:
    graft = BoundGraft(parse(text), fp32.shape)
    with pytest.raises(FormatError, match=wrong):
        to_lora(graft, random_tensors(graft, 6), fp32.weight, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lora", "vera", "dora", "bitfit", "norms", "sublayers"])
def test_transformers_loads_a_model_with_the_graft_inside(name: str, fp32: Backbone, tmp_path: Path) -> None:
    row, target = EVERY[name], tmp_path / "merged"
    values = {tensor: value.float() for tensor, value in row.values(fp32.shape, seed=7).items()}
    merged.export(target, row.graft(fp32.shape), values, backbone=fp32.folder)
    model, info = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, output_loading_info=True)  # type: ignore[misc]
    assert not info["missing_keys"] and not info["unexpected_keys"]  # type: ignore[has-type]
    assert relative(model(IDS[None]).logits[0], unmerged(row.graft(fp32.shape), values, fp32, IDS)) < 1e-5  # type: ignore[has-type]
    assert (target / "tokenizer.json").read_bytes() == (fp32.folder / "tokenizer.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_model_in_several_files_and_bf16_keeps_both(tmp_path: Path) -> None:
    whole = tiny_llama(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    parts = len(list((tmp_path / "parts").glob("*.safetensors")))
    shape = Backbone.load(whole, torch.float32).shape
    graft = BoundGraft(parse("bitfit(at=attn.k) + lora(r=2)"), shape)
    values = {name: value.float() for name, value in random_tensors(graft, seed=8).items()}
    merged.export(tmp_path / "merged", graft, values, backbone=tmp_path / "parts")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == parts > 1
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert found.dtype == torch.bfloat16
    original = {name: value.float() for name, value in model.state_dict().items()}
    dW = values["1.1.attn.k.B"].T @ values["1.1.attn.k.A"] * 8
    layer = found.model.layers[1].self_attn
    assert torch.equal(layer.k_proj.weight, (original["model.layers.1.self_attn.k_proj.weight"] + dW).bfloat16())
    assert torch.equal(layer.k_proj.bias, values["0.1.attn.k.b"].bfloat16())
    assert not layer.o_proj.bias.count_nonzero()


def test_nothing_is_left_of_an_export_that_fails(fp32: Backbone, tmp_path: Path) -> None:
    graft = BoundGraft(parse("serial(2)"), fp32.shape)
    with pytest.raises(SpecError, match="cannot be folded"):
        merged.export(tmp_path / "new", graft, random_tensors(graft, 0), backbone=fp32.folder)
    (tmp_path / "old").mkdir()
    lora = BoundGraft(parse("lora(r=1)"), fp32.shape)
    with pytest.raises(FormatError, match="exists already"):
        merged.export(tmp_path / "old", lora, random_tensors(lora, 0), backbone=fp32.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert json.loads((fp32.folder / "config.json").read_text())["attention_bias"] is False


# What every projection of an architecture can take, and what not all of them can.
BIASED, BARE = "lora(r=2) + bitfit", "lora(r=2) + ia3(at=attn.*, feedforward=ffn.down)"
NORMED = " + bitfit(at=norm.1) + ia3(at=ffn.out, feedforward=)"
ARCHITECTURES = {
    "llama": BIASED + NORMED,
    "mistral": BARE,
    "qwen2": BARE + " + bitfit(at=attn.[qkv])",
    "qwen3": BARE + " + bitfit(at=attn.*)",
    "gemma": BARE + " + ia3(at=norm.1|norm.2|ffn.out, feedforward=)",
    "phi": BIASED + NORMED,
    "gpt2": BIASED + NORMED,
    "gpt_neox": BIASED + NORMED,
    "opt": BIASED + NORMED,
    "bert": BIASED + " + ia3(at=attn.out, feedforward=)",
    "roberta": BIASED,
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_merged_into_its_own_files(
    arch: str, tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    backbone = Backbone.load(tiny_folders[arch], torch.float32)
    graft = BoundGraft(parse(ARCHITECTURES[arch]), backbone.shape)
    values = {name: value.float() for name, value in random_tensors(graft, seed=10).items()}
    merged.export(tmp_path / "merged", graft, values, backbone=backbone.folder)
    found = Backbone.load(tmp_path / "merged", torch.float32)
    nothing = BoundGraft(parse("lora(r=1)"), found.shape)
    zeros = {t.name: torch.zeros(t.shape) for t in nothing.tensors}
    expected = unmerged(graft, values, backbone, IDS)
    assert relative(unmerged(nothing, zeros, found, IDS), expected) < 1e-5
    assert relative(unmerged(nothing, zeros, backbone, IDS), expected) > 1e-2


def test_a_bias_without_a_place_and_a_norm_before_a_residual_sum_are_refused(
    tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    for arch, text, error in (
        ("mistral", "bitfit", "mistral has no such bias"),
        ("bert", "bitfit(at=norm.1)", "is read by more than projections"),
    ):
        backbone = Backbone.load(tiny_folders[arch], torch.float32)
        graft = BoundGraft(parse(text), backbone.shape)
        values = random_tensors(graft, seed=0)
        with pytest.raises((FormatError, SpecError), match=error):
            merged.export(tmp_path / arch, graft, values, backbone=backbone.folder)
    assert not list(tmp_path.iterdir())
