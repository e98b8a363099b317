"""The native graft folder: comes back as it was written, or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native, tensor_file
from polygraft.grafts.formats.check import FormatError, check
from polygraft.grafts.grammar import parse
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import Branch, GraftSpec
from polygraft.kernels.common import atomic
from tests.grafts.oracle.row import random_tensors
from tests.grafts.oracle.table import METHODS, MORE

SHAPE = ModelShape("llama", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=512)
ROWS = {**METHODS, **MORE}
LORA = parse("lora(r=4, at=attn.q)")


def values_of(spec: GraftSpec, seed: int = 0) -> dict[str, Tensor]:
    return {name: value.float() for name, value in random_tensors(BoundGraft(spec, SHAPE), seed).items()}


def saved(root: Path, spec: GraftSpec = LORA) -> Path:
    return root / native.save(root, BoundGraft(spec, SHAPE), values_of(spec), backbone="stock")


def load(folder: Path, backbone: str = "stock") -> native.StoredGraft:
    return native.load(folder, shape=SHAPE, backbone=backbone)


@pytest.mark.parametrize("name", ROWS)
def test_a_graft_comes_back_as_it_was_saved(name: str, tmp_path: Path) -> None:
    spec = ROWS[name].spec
    folder = saved(tmp_path, spec)
    stored = load(folder)
    assert (stored.id, stored.graft.spec, stored.backbone) == (folder.name, spec, "stock")
    assert stored.tensors.keys() == values_of(spec).keys()
    assert all(torch.equal(stored.tensors[key], value) for key, value in values_of(spec).items())


def test_the_id_is_of_slots_tensors_and_backbone() -> None:
    values = values_of(LORA)
    same = native.graft_id(replace(LORA, method="written otherwise"), dict(reversed(values.items())), "stock")
    other_values = {**values, "0.1.attn.q.B": values["0.1.attn.q.B"] + 1e-3}
    other_slots = GraftSpec("lora", (Branch(at="attn.q", rank=4, scale=1.0),))
    ids = {
        same,
        native.graft_id(LORA, values, "stock"),
        native.graft_id(LORA, values, "other stock"),
        native.graft_id(LORA, other_values, "stock"),
        native.graft_id(other_slots, values, "stock"),
    }
    assert same == native.graft_id(LORA, values, "stock") and len(ids) == 4


def test_a_whole_number_where_a_fraction_is_read_back_gives_the_same_id(tmp_path: Path) -> None:
    spec = GraftSpec("lora", (Branch(at="attn.q", rank=4, scale=2, dropout=0),))
    assert load(saved(tmp_path, spec)).id == native.graft_id(spec, values_of(spec), "stock")


def test_the_same_graft_is_written_once(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    before = (folder / "graft.json").stat().st_mtime_ns
    assert saved(tmp_path) == folder
    assert (folder / "graft.json").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_others_may_read_the_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


@pytest.mark.parametrize(("module", "broken"), [(atomic, "sync"), (tensor_file, "save_file")])
def test_a_save_that_fails_leaves_nothing(
    module: ModuleType, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **_more: object) -> None:
        if broken == "save_file":
            save_file({"x": torch.ones(1)}, tmp_path / "no such folder" / "x")  # raises safetensors' own error
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, broken, full)
    with pytest.raises(OSError, match=r"No space left|No such file"):
        saved(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_race_for_the_same_graft_has_two_winners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = saved(tmp_path / "elsewhere")
    move = atomic.move

    def overtaken(draft: Path, target: Path) -> None:
        shutil.copytree(twin, target)
        move(draft, target)

    monkeypatch.setattr(atomic, "move", overtaken)
    assert saved(tmp_path / "here").name == twin.name
    assert [path.name for path in (tmp_path / "here").iterdir()] == [twin.name]


def test_a_graft_of_another_backbone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="grown on backbone 'stock', not on 'quince'"):
        load(saved(tmp_path), backbone="quince")


def test_values_that_are_not_finite_are_refused_both_ways(tmp_path: Path) -> None:
    values = values_of(LORA)
    values["0.1.attn.q.B"][0, 0] = torch.nan
    with pytest.raises(FormatError, match=r"0.1.attn.q.B: holds values that are not finite"):
        native.save(tmp_path, BoundGraft(LORA, SHAPE), values, backbone="stock")
    assert not list(tmp_path.iterdir())
    folder = saved(tmp_path)
    save_file(values, folder / "graft.safetensors")
    with pytest.raises(FormatError, match=r"0.1.attn.q.B: holds values that are not finite"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_found_wherever_it_lies(bad: float, dtype: torch.dtype) -> None:
    graft = BoundGraft(LORA, SHAPE)
    values = {name: value.to(dtype) for name, value in values_of(LORA).items()}
    check(graft, values)
    for name, value in values.items():
        for at in (0, 100, -1):
            spoilt = value.clone()
            spoilt.view(-1)[at] = bad
            with pytest.raises(FormatError, match=f"{name}: holds values that are not finite"):
                check(graft, {**values, name: spoilt})


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    whole = (folder / "graft.safetensors").read_bytes()
    (folder / "graft.safetensors").write_bytes(whole[:keep])
    with pytest.raises(FormatError, match=folder.name):
        load(folder)


def test_contents_that_are_not_the_ids_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    values = load_file(folder / "graft.safetensors")
    save_file({name: value * 2 for name, value in values.items()}, folder / "graft.safetensors")
    with pytest.raises(FormatError, match="its contents have the id"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2 is not 1"),
        ({"id": None}, "its contents have the id"),
        ({"spec": None}, "got None"),
        ({"spec": {"method": "x", "slots": []}}, "empty union"),
        ({"spec": {"method": "x", "slots": [{"op": "branch", "at": "attn.q", "rank": 4, "evil": 1}]}}, "evil"),
        ({"spec": {"method": "x", "slots": [{"op": "branch", "at": "attn.q", "rank": 4, "layers": [9]}]}}, "layers: 9"),
        ({"spec": {"method": "x", "slots": [{"op": "branch", "at": "attn.q", "rank": 5}]}}, r"shape \(4, 64\)"),
        ({"spec": {"method": "x", "slots": [{"op": "branch", "at": "attn.k", "rank": 4}]}}, "missing or unknown"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    described = json.loads((folder / "graft.json").read_text())
    (folder / "graft.json").write_text(json.dumps({**described, **change}))
    with pytest.raises(FormatError, match=message):
        load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "[" * 100_000])
def test_a_description_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "graft.json").write_text(text)
    with pytest.raises(FormatError, match=f"{folder.name}/graft.json"):
        load(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"nowhere: holds no graft\.json"):
        load(tmp_path / "nowhere")
