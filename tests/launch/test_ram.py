"""The memory of a machine, and what its service is told."""

from __future__ import annotations

from pathlib import Path

import psutil

from polygraft.cluster.settings import PackSettings, Settings, load
from polygraft.launch import supervisor
from polygraft.launch.ram import ram
from polygraft.launch.run_folder import RunFolder


def test_a_container_has_the_memory_that_its_limit_says(tmp_path: Path) -> None:
    whole, part = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    assert ram((whole, part)) == psutil.virtual_memory().total
    whole.write_text("max\n")
    part.write_text("1048576\n")
    assert ram((whole,)) == psutil.virtual_memory().total
    assert ram((whole, part)) == 1 << 20


def test_the_service_is_told_what_was_given_and_no_more(tmp_path: Path) -> None:
    """So that what was not is derived where the device is known."""
    folder = RunFolder(tmp_path)
    folder.path.mkdir()
    given = load(home=tmp_path, store_url="memory://", pack=PackSettings(max_jobs=3), serve={"max_context": 64})
    supervisor._children(given, folder, tmp_path)
    kept = Settings.model_validate_json(folder.settings.read_text())
    assert kept == given
    assert (kept.pack.model_fields_set, kept.serve.model_fields_set) == ({"max_jobs"}, {"max_context"})
