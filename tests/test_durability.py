"""A file that must be whole is, whenever its writer is killed, and on disk before anyone is told of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from polygraft.kernels.common import atomic
from tests.killed_writers import WRITERS, Killed


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Killed]:
    command = [sys.executable, "-m", "tests.killed_writers", str(tmp_path_factory.mktemp("killed"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    found: list[Killed] = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["writer"]: line for line in found}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_killed_writer_leaves_what_was_there_or_all_of_the_new(writer: str, ran: dict[str, Killed]) -> None:
    before, after, killed = ran[writer]["before"], ran[writer]["after"], ran[writer]["killed"]
    assert before != after
    assert len(killed) >= 4
    for step, files in enumerate(killed):
        assert files in (before, after), f"killed before step {step}"
    assert killed[0] == before
    assert killed[-1] == after  # the last step waits until the new name is on disk


@pytest.mark.parametrize("writer", WRITERS)
def test_after_a_kill_the_same_is_written_again(writer: str, ran: dict[str, Killed]) -> None:
    assert ran[writer]["again"]
    assert all(files == ran[writer]["after"] for files in ran[writer]["again"])


def test_a_file_is_synced_before_it_gets_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = _steps(monkeypatch)
    atomic.write_text(tmp_path / "file", "text")
    draft, target = steps[0][1], str(tmp_path / "file")
    assert Path(draft).parent == tmp_path and Path(draft).name.startswith(".file.draft-")
    assert steps == [("sync", draft), ("rename", target), ("sync", str(tmp_path))]


def test_all_of_a_folder_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = _steps(monkeypatch)
    with atomic.whole_folder(tmp_path / "folder") as draft:
        (draft / "below").mkdir()
        (draft / "below" / "file").write_text("text")
    inside = {("sync", str(path)) for path in (draft, draft / "below", draft / "below" / "file")}
    assert set(steps[:3]) == inside
    assert steps[3:] == [("rename", str(tmp_path / "folder")), ("sync", str(tmp_path))]


def test_the_names_of_new_parents_are_on_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = _steps(monkeypatch)
    atomic.make_folder(tmp_path / "one" / "two")
    assert steps == [("sync", str(tmp_path)), ("sync", str(tmp_path / "one"))]


def test_a_writer_that_raises_leaves_nothing_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic.whole_file(tmp_path / "file") as draft:
        _half(draft)
    with pytest.raises(ZeroDivisionError), atomic.whole_folder(tmp_path / "folder") as draft:
        _half(draft / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def _half(path: Path) -> None:
    path.write_text("half")
    raise ZeroDivisionError


def test_drafts_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".name.draft-file").touch()
    (tmp_path / ".name.draft-folder").mkdir()
    (tmp_path / ".name.draft-folder" / "file").touch()
    for kept in ("name", ".name", ".other.draft-file"):
        (tmp_path / kept).touch()
    atomic.remove_drafts(tmp_path / "name")
    assert {path.name for path in tmp_path.iterdir()} == {"name", ".name", ".other.draft-file"}


def test_a_private_file_is_nobodys_to_read_at_any_time(tmp_path: Path) -> None:
    with atomic.whole_file(tmp_path / "key", mode=0o600) as draft:
        assert draft.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def _steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is synced and renamed from here on, in order."""
    steps: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        steps.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def replaced(source: Path, target: Path) -> None:
        steps.append(("rename", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    return steps
