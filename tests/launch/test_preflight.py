"""What keeps a service from starting is said by its setting and its numbers, before anything is started."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polygraft.cluster.settings import ServeSettings, load
from polygraft.launch import preflight
from polygraft.launch.machine import PROCESSES_BYTES, Machine
from polygraft.launch.preflight import CACHE_BYTES, HOME_BYTES, SCRATCH_BYTES, obstacles
from tests.tiny import tiny_llama

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the machine has."""

    def have(memory: int = 1 << 50, disk: Callable[[Path], int] = lambda _: 1 << 50, cores: int = 64) -> None:
        monkeypatch.setattr(preflight, "available", lambda: memory)
        monkeypatch.setattr(preflight, "free_bytes", disk)
        monkeypatch.setattr(Machine, "here", lambda _: Machine(cores=cores, bytes=memory, gpus=0))

    return have


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone whose files have a gibibyte, most of it a hole."""
    found = tiny_llama(tmp_path_factory.mktemp("tiny"))
    left = GIB - (found / "model.safetensors").stat().st_size
    header = {"hole": {"dtype": "U8", "shape": [left - 128], "data_offsets": [0, left - 128]}}
    with (found / "more.safetensors").open("wb") as file:
        file.write((120).to_bytes(8, "little") + json.dumps(header).encode().ljust(120))
        file.truncate(left)
    return found


@pytest.mark.parametrize(
    ("given", "held"),
    [({}, GIB), ({"dtype": "fp32"}, 2 * GIB), ({"quantise": "nf4"}, GIB // 4), ({"device": "cuda"}, 0)],
    ids=["as it lies", "float32", "in four bits", "on a GPU"],
)
def test_a_backbone_that_memory_is_too_short_for_is_told_with_what_it_takes(
    given: dict[str, Any], held: int, folder: Path, tmp_path: Path, room: Callable[..., None]
) -> None:
    serve = ServeSettings(kv_bytes=GIB)
    settings = load(home=tmp_path, backbone=str(folder), serve=serve, **given)
    needed = held + GIB + PROCESSES_BYTES
    room(memory=needed)
    assert [*obstacles(settings)] == []
    room(memory=needed - 1)
    told = f"serving {folder} needs about {needed / GIB:.1f} GiB, {(needed - 1) / GIB:.1f} are available"
    found = [*obstacles(settings)]
    assert found == [] if "device" in given else len(found) == 1 and found[0].startswith(f"memory: {told}; ")


def test_each_folder_has_the_room_that_it_needs_at_least(tmp_path: Path, room: Callable[..., None]) -> None:
    home, data = tmp_path / "home", tmp_path / "data" / "far" / "below"
    home.mkdir()
    (tmp_path / "data").mkdir()
    settings = load(home=home, data=data, backbone="someone/something")
    least = {home: HOME_BYTES, tmp_path / "data": HOME_BYTES, Path(tempfile.gettempdir()): SCRATCH_BYTES}
    room(disk=least.__getitem__)
    assert [*obstacles(settings)] == []
    for short in least:
        room(disk=lambda path, short=short: least[path] - (path == short))
        (said,) = obstacles(settings)
        assert said.startswith("disk: ") and f"free under {short}, at least {least[short] // MIB} are" in said


def test_the_embedded_backbone_needs_room_while_it_is_converted_and_none_once_it_is_there(
    tmp_path: Path, room: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "backbone_cache", lambda: tmp_path / "cache")
    settings = load(home=tmp_path / "home")
    asked: list[Path] = []

    def disk(path: Path) -> int:
        asked.append(path)
        return CACHE_BYTES - 1

    room(disk=disk)
    assert [f"at least {CACHE_BYTES // MIB} are needed" in said for said in obstacles(settings)] == [True]
    before = len(asked)
    tiny_llama(tmp_path / "cache" / settings.backbone)
    assert [*obstacles(settings)] == [] and len(asked) == 2 * before - 1


def test_devices_that_have_no_room_for_a_pack_and_a_replica_are_told_before_the_memory_is(
    folder: Path, tmp_path: Path, room: Callable[..., None]
) -> None:
    settings = load(home=tmp_path, backbone=str(folder), devices=2, serve=ServeSettings(kv_bytes=MIB))
    least = 2 * GIB + 256 * MIB
    room(memory=2 * least)
    assert [*obstacles(settings)] == []
    room(memory=2 * least - 1)
    assert [said.partition(":")[0] for said in obstacles(settings)] == ["devices"]
    room(cores=1)
    assert ["has 1 cores" in said for said in obstacles(settings)] == [True]


@pytest.mark.parametrize("backbone", ["no such/folder/at all", ""])
def test_a_name_that_is_no_folder_and_no_model_of_the_hub_is_told(
    backbone: str, tmp_path: Path, room: Callable[..., None]
) -> None:
    room()
    (tmp_path / "empty").mkdir()
    (said,) = obstacles(load(home=tmp_path, backbone=backbone or str(tmp_path / "empty")))
    assert said.startswith("backbone: ")
