"""Folders that somebody made to hurt: what may not be opened is not, and no pattern takes long."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native, peft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.formats.description import DESCRIPTION
from polygraft.grafts.formats.peft_config import asked_for
from polygraft.grafts.formats.read import read
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.spec import SpecError
from tests.grafts.oracle.row import random_tensors

NATIVE, PEFT = (DESCRIPTION, native.WEIGHTS), (peft.CONFIG, peft.WEIGHTS)


@pytest.fixture(scope="module")
def backbone(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float32)


@pytest.fixture
def folder(backbone: Backbone, tmp_path: Path) -> Path:
    """Both formats of one graft."""
    graft = BoundGraft(parse("lora(r=4, alpha=8, at=attn.[qv])"), backbone.shape)
    return tmp_path / native.save(tmp_path, graft, random_tensors(graft, seed=1), backbone=backbone.fingerprint)


def opened(folder: Path, backbone: Backbone) -> None:
    read(folder, BackboneFiles(backbone.folder), backbone.fingerprint)


def only(folder: Path, names: tuple[str, ...]) -> Path:
    for file in folder.iterdir():
        if file.name not in names:
            file.unlink()
    return folder


@pytest.mark.parametrize("names", [NATIVE, PEFT], ids=["native", "peft"])
@pytest.mark.parametrize("which", [0, 1], ids=["description", "weights"])
@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "folder", "link in a circle", "link to a fifo"])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(
    kind: str, which: int, names: tuple[str, ...], folder: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = only(folder, names) / names[which]
    file.unlink()
    make: dict[str, Callable[[], object]] = {
        "fifo": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/zero"),
        "socket": lambda: _bound(file, monkeypatch),
        "folder": file.mkdir,
        "link in a circle": lambda: file.symlink_to(file.name),
        "link to a fifo": lambda: (os.mkfifo(folder / "fifo"), file.symlink_to("fifo")),  # type: ignore[func-returns-value]
    }
    make[kind]()
    with pytest.raises(FormatError, match=f"{names[which]}: is no regular file|holds no"):
        opened(folder, backbone)


def _bound(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(file.name)


@pytest.mark.parametrize("names", [NATIVE, PEFT], ids=["native", "peft"])
def test_links_inside_a_hugging_face_cache_load_and_those_that_leave_it_do_not(
    names: tuple[str, ...], folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    """As `hf download` and `snapshot_download` leave a folder: links from snapshots/REVISION to the blobs."""
    repository = tmp_path / "models--owner--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(names):
        (folder / name).rename(blobs / f"{number:064}")
        (snapshot / name).symlink_to(f"../../blobs/{number:064}")
    opened(snapshot, backbone)
    other = tmp_path / "models--owner--other" / "blobs" / "1"
    other.parent.mkdir(parents=True)
    other.write_bytes((snapshot / names[1]).read_bytes())
    for target in (other, Path("../../other/1"), Path("../../refs")):
        (snapshot / names[1]).unlink()
        (snapshot / names[1]).symlink_to(target)
        (repository / "other").mkdir(exist_ok=True)
        (repository / "other" / "1").write_bytes(other.read_bytes())
        (repository / "refs").write_bytes(other.read_bytes())
        with pytest.raises(FormatError, match=f"0a1b/{names[1]}: is a link out of the folder"):
            opened(snapshot, backbone)


@pytest.mark.parametrize("names", [NATIVE, PEFT], ids=["native", "peft"])
def test_a_folder_that_only_looks_like_a_cache_is_held_to_the_rule(
    names: tuple[str, ...], folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    inner = tmp_path / "mine" / "snapshots" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "mine" / "blobs").mkdir()
    for name in names:
        (folder / name).rename(tmp_path / "mine" / "blobs" / name)
        (inner / name).symlink_to(f"../../blobs/{name}")
    with pytest.raises(FormatError, match="is a link out of the folder"):
        opened(inner, backbone)


SLOW: dict[str, dict[str, object]] = {
    "a rank's": {"rank_pattern": {"(a+)+$": 8}},
    "many": {"rank_pattern": {f"(layer{n}|.*)+x": 8 for n in range(50_000)}},
    "many names": {"rank_pattern": {f"model.layers.{n}.self_attn.q_proj": 8 for n in range(50_000)}},
    "deep": {"target_modules": "(?:" * 5000},
    "deep and closed": {"target_modules": "(?:" * 5000 + "a" + ")" * 5000},
    "repeated": {"target_modules": "(?:a{10000}){10000}"},
    "repeated with little": {"target_modules": "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"},
    "backtracking": {"target_modules": "(.|..|...)*[A-Z]"},
    "in itself": {"target_modules": "(?R)*"},
    "long": {"target_modules": "a?" * 1_000_000},
    "of a layer": {"layers_to_transform": [0], "layers_pattern": ["(.+)+" * 50] * 1000},
    "of what is left out": {"exclude_modules": "(x+x+)+y"},
    "of what is saved": {"modules_to_save": ["(x+x+)+y" * 20] * 1000},
}


@pytest.mark.parametrize("pattern", SLOW)
def test_no_pattern_of_a_config_takes_long(pattern: str, folder: Path, backbone: Backbone) -> None:
    config = json.loads((only(folder, PEFT) / peft.CONFIG).read_text()) | SLOW[pattern]
    (folder / peft.CONFIG).write_text(json.dumps(config))
    backbone_files, begun = BackboneFiles(backbone.folder), time.thread_time()
    said = ""
    try:
        peft.load(folder, backbone.shape, backbone_files)
    except FormatError as error:
        said = str(error)
    with suppress(SpecError):
        asked_for(json.dumps(config), backbone.shape, backbone_files)
    assert len(said) < 1500
    assert time.thread_time() - begun < 1.5  # both, and the file's own reading


def test_files_that_are_far_too_long_are_refused_unread(folder: Path, backbone: Backbone) -> None:
    only(folder, PEFT)
    (folder / peft.CONFIG).write_text(" " * (5 << 20) + "{}")
    with pytest.raises(FormatError, match="5242882 bytes; at most"):
        opened(folder, backbone)


def test_a_header_that_is_far_too_long_is_refused_unread(folder: Path, backbone: Backbone) -> None:
    weights = only(folder, PEFT) / peft.WEIGHTS
    save_file({"x": torch.zeros(1)}, weights, metadata={"x": "y" * (17 << 20)})
    with pytest.raises(FormatError, match=r"a header of .* bytes; at most"):
        opened(folder, backbone)


@pytest.mark.parametrize(
    ("first", "last"), [(0, 36), *(pytest.param(n, n + 91, marks=pytest.mark.nightly) for n in (36, 127, 218, 309))]
)
def test_a_mutated_folder_is_refused_or_loaded_soon_and_hurts_nobody(
    first: int, last: int, tiny_folder: Path, tmp_path: Path
) -> None:
    """In a process of its own, which ends well: 400 by night."""
    command = [
        sys.executable,
        "-m",
        "tests.grafts.mutated_folders",
        str(tiny_folder),
        str(tmp_path),
        str(first),
        str(last),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    found = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")]
    assert ended.returncode == 0 and len(found) == last - first, ended.stderr[-2000:]
    assert [one for one in found if one[2] not in ("loaded", "refused") or one[3] > 2 or one[4] > 200] == []
    assert {one[2] for one in found} == {"loaded", "refused"}
