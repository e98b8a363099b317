"""GGUF files of LoRAs: read back by gguf's own reader, they are the change of the weights as llama.cpp keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import gguf_lora
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.formats.to_lora import to_lora
from polygraft.grafts.grammar import parse
from polygraft.grafts.merge import Fold
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sites import Site
from tests.grafts.oracle.row import random_tensors, relative

NAMES = {
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "ffn.gate": "ffn_gate",
    "ffn.up": "ffn_up",
    "ffn.down": "ffn_down",
}
UNTOUCHED = ("qwen2", "phi", "gemma")  # whose q and k llama.cpp keeps as they are


def changes(file: Path) -> dict[str, Tensor]:
    """dW of every weight that the file names, as llama.cpp adds it: scale (alpha / r) B A, r being B's columns."""
    reader = GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    found = {}
    for name in tensors:
        if name.endswith(".lora_a"):
            A, B = tensors[name], tensors[f"{name.removesuffix('a')}b"]
            assert A.shape[0] == B.shape[1]
            found[name.removesuffix(".lora_a")] = alpha / B.shape[1] * B @ A
    assert len(tensors) == 2 * len(found)
    return found


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of the rows of q and k: i of one half of a head, then i of the other, row by row."""
    half = len(rows) // heads // 2
    order = [head * 2 * half + which * half + i for head in range(heads) for i in range(half) for which in range(2)]
    return rows[torch.tensor(order)]


@pytest.mark.parametrize(
    "text",
    [
        "lora(r=4, alpha=6)",
        "rslora(r=3, alpha=5, at=attn.*)@1",
        "pissa(r=2, alpha=3, at=attn.q|ffn.down)",
        "vera(r=4, at=attn.[qv])",
        "moslora(r=3, at=ffn.*)",
        "lora(r=2, alpha=3, at=attn.q) + lora(r=5, alpha=1, at=attn.[qk])@0",
        "lora(r=2, alpha=0, at=attn.q) + lora(r=3, alpha=4, at=attn.[qv])",
    ],
)
def test_the_file_is_the_change_of_the_weights(text: str, tiny_folder: Path, tmp_path: Path) -> None:
    agrees(Backbone.load(tiny_folder, torch.float32), text, tmp_path / "lora.gguf")


@pytest.mark.parametrize("arch", ["mistral", *UNTOUCHED, "qwen3"])
def test_every_architecture_has_llamas_names_or_its_own_order(
    arch: str, tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    agrees(Backbone.load(tiny_folders[arch], torch.float32), "lora(r=4, alpha=6)", tmp_path / "lora.gguf")


def agrees(backbone: Backbone, text: str, file: Path) -> None:
    shape = backbone.shape
    graft = BoundGraft(parse(text), shape)
    values = random_tensors(graft, seed=2)
    gguf_lora.export(file, graft, values)
    fold = Fold(graft, values, lambda site: backbone.weight(site).double())
    expected: dict[str, Tensor] = {}
    for site in fold.sites:
        change = fold.at(site).weight - backbone.weight(site).double()
        if shape.arch in ("llama", "mistral") and site.name in ("attn.q", "attn.k"):
            change = interleaved(change, shape.heads if site.name == "attn.q" else shape.kv_heads)
        expected[f"blk.{site.layer}.{NAMES[site.name]}.weight"] = change
    found = changes(file)
    assert found.keys() == expected.keys()
    assert all(relative(found[name], value) < 1e-6 for name, value in expected.items())


def test_its_fields_are_those_of_llama_cpps_own_converter(tiny_folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(tiny_folder, torch.float32)
    graft = BoundGraft(parse("lora(r=4, alpha=6, at=attn.v)@0"), backbone.shape)
    gguf_lora.export(tmp_path / "a.gguf", graft, random_tensors(graft, seed=1))
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "a.gguf").fields.items()}
    assert {name: value for name, value in fields.items() if not name.startswith("GGUF.")} == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
        "general.name": "a",
        "general.file_type": 0,
    }


def test_another_graft_goes_by_its_singular_values(tiny_folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(tiny_folder, torch.float32)
    graft = BoundGraft(parse("loha(r=2, at=attn.v)"), backbone.shape)
    values = random_tensors(graft, seed=1)
    with pytest.raises(FormatError, match="not exactly a LoRA; give a rank or an energy"):
        gguf_lora.export(tmp_path / "a.gguf", graft, values)
    lora = to_lora(graft, values, backbone.weight, rank=4)
    gguf_lora.export(tmp_path / "a.gguf", lora.graft, lora.tensors)
    fold = Fold(graft, values, lambda site: backbone.weight(site).double())
    site = Site(1, "attn.v")
    assert (
        relative(changes(tmp_path / "a.gguf")["blk.1.attn_v.weight"], fold.at(site).weight - backbone.weight(site))
        < 1e-5
    )


@pytest.mark.parametrize(("text", "wrong"), [("prefix(2)", "not exactly"), ("dora", "not exactly"), ("ia3", "not")])
def test_what_is_no_lora_is_refused(text: str, wrong: str, tiny_folder: Path, tmp_path: Path) -> None:
    shape = Backbone.load(tiny_folder, torch.float32).shape
    graft = BoundGraft(parse(text), shape)
    with pytest.raises(FormatError, match=wrong):
        gguf_lora.export(tmp_path / "a.gguf", graft, random_tensors(graft, seed=1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "bert", "opt"])
def test_a_model_that_llama_cpp_keeps_otherwise_is_refused(
    arch: str, tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    shape = Backbone.load(tiny_folders[arch], torch.float32).shape
    graft = BoundGraft(parse("lora(r=2)"), shape)
    with pytest.raises(FormatError, match=f"gguf: {arch} is not kept as here; choices: llama, mistral"):
        gguf_lora.export(tmp_path / "a.gguf", graft, random_tensors(graft, seed=1))


def test_a_file_that_is_there_stays(tiny_folder: Path, tmp_path: Path) -> None:
    shape = Backbone.load(tiny_folder, torch.float32).shape
    graft = BoundGraft(parse("lora(r=2)"), shape)
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(FormatError, match="exists already"):
        gguf_lora.export(tmp_path / "a.gguf", graft, random_tensors(graft, seed=1))
    assert (tmp_path / "a.gguf").read_text() == "mine"


@pytest.mark.parametrize("alpha", ["0", "1e-50"])
def test_a_lora_of_alpha_zero_changes_nothing(alpha: str, tiny_folder: Path, tmp_path: Path) -> None:
    shape = Backbone.load(tiny_folder, torch.float32).shape
    graft = BoundGraft(parse(f"lora(r=2, alpha={alpha}, at=attn.v)"), shape)
    gguf_lora.export(tmp_path / "a.gguf", graft, random_tensors(graft, seed=1))
    found = changes(tmp_path / "a.gguf")
    assert len(found) == shape.layers and not any(change.any() for change in found.values())
