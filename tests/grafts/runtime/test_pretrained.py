"""A backbone's folder: made once whoever asks, checked before use, and known by what it computes."""

from __future__ import annotations

import json
import shutil
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from polygraft.grafts.runtime import pretrained
from polygraft.grafts.runtime.checked import BackboneError
from polygraft.grafts.runtime.pretrained import fingerprint, materialise


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model", ignore=shutil.ignore_patterns(".fingerprint.json"))


def test_a_folder_is_used_as_it_is(folder: Path, tmp_path: Path) -> None:
    assert materialise(str(folder), tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()


def test_weights_in_pickle_files_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=r"only pytorch_model.bin, which can run code when loaded"):
        materialise(str(folder), tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_folder_without_a_needed_file_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(BackboneError, match=f"model holds no {name}"):
        materialise(str(folder), tmp_path)


@pytest.mark.parametrize("name", ["", "gpt", "/no/such/folder", "../up", "a/../b", "a/b/c"])
def test_a_name_that_is_nothing_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(BackboneError, match="is neither 'smollm2', nor a folder here, nor a hub id"):
        materialise(name, tmp_path / "cache") if name else materialise("\0", tmp_path / "cache")


def test_a_hub_that_cannot_be_reached_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="'owner/name' could not be downloaded"):
        materialise("owner/name", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".owner--name.lock"]


def test_leftovers_of_a_killed_process_are_removed(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / ".name.draft-dead").mkdir(parents=True)
    made = pretrained._once(cache / "name", lambda new: shutil.copytree(folder, new, dirs_exist_ok=True))  # type: ignore[arg-type]
    assert sorted(path.name for path in cache.iterdir()) == [".name.lock", "name"]
    assert (made / "model.safetensors").stat().st_mode & 0o777 == 0o644


def race(cache: Path, source: Path) -> int:
    made = 0

    def make(new: Path) -> None:
        nonlocal made
        made += 1
        shutil.copytree(source, new, dirs_exist_ok=True)

    pretrained._once(cache / "name", make)
    return made


def test_of_racing_processes_one_makes_the_folder(folder: Path, tmp_path: Path) -> None:
    with get_context("fork").Pool(4) as pool:
        assert sum(pool.starmap(race, [(tmp_path / "cache", folder)] * 4)) == 1


def test_the_fingerprint_is_of_what_the_model_computes(folder: Path) -> None:
    before = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9", "_name_or_path": "x"}))
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    save_file({name: tensors[name] for name in names[3:]}, folder / "model-00001.safetensors")
    save_file({name: tensors[name] for name in names[:3]}, folder / "model-00002.safetensors")
    assert fingerprint(folder) == before
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert fingerprint(folder) != before


def test_one_changed_weight_changes_the_fingerprint(folder: Path) -> None:
    before = fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors")
    assert fingerprint(folder) != before


def test_the_fingerprint_is_kept_and_a_broken_note_of_it_is_made_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fingerprint(folder)
    (folder / ".fingerprint.json").write_text("{}")
    assert fingerprint(folder) == found
    monkeypatch.setattr(pretrained, "_tensors", lambda _: pytest.fail("read the weights again"))
    assert fingerprint(folder) == found


@pytest.mark.parametrize("header", [b"\xff" * 8, b"\x04" + b"\0" * 7 + b"null", b"\x02" + b"\0" * 7 + b"[]"])
def test_a_file_that_is_no_safetensors_is_named(header: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(header)
    with pytest.raises(BackboneError, match=r"model.safetensors is not a safetensors file"):
        fingerprint(folder)


def test_the_embedded_backbone_is_plain_bf16_and_answers(smollm2_folder: Path) -> None:
    assert "quantization_config" not in json.loads((smollm2_folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype="auto", use_safetensors=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])  # "The capital of France is"
    assert model(ids).logits[0, -1].argmax() == 7042  # " Paris"
