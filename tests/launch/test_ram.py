"""The memory of a machine, and what packs may take of it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from polygraft.cluster.settings import PackSettings, Settings, load
from polygraft.launch import supervisor
from polygraft.launch.ram import limited, ram
from polygraft.launch.run_folder import RunFolder


def test_a_pack_may_take_half_the_memory_unless_told(tmp_path: Path) -> None:
    assert limited(load(home=tmp_path)).pack_limits.pack_bytes == ram() // 2


@pytest.mark.parametrize("bytes", [0, 1 << 40])
def test_what_the_settings_say_of_a_packs_memory_stays(tmp_path: Path, bytes: int) -> None:
    said = load(home=tmp_path, pack=PackSettings(memory_bytes=bytes))
    assert limited(said) == said


def test_a_container_has_the_memory_that_its_limit_says(tmp_path: Path) -> None:
    whole, part = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    assert ram((whole, part)) == psutil.virtual_memory().total
    whole.write_text("max\n")
    part.write_text("1048576\n")
    assert ram((whole,)) == psutil.virtual_memory().total
    assert ram((whole, part)) == 1 << 20


def test_the_services_own_settings_have_the_decision(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.path.mkdir()
    supervisor._children(load(home=tmp_path, store_url="memory://"), folder, tmp_path)
    kept = Settings.model_validate_json(folder.settings.read_text())
    assert kept.pack.memory_bytes == ram() // 2
