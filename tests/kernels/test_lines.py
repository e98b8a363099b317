"""Logs take a bounded share of the disk, in themselves and together."""

from __future__ import annotations

import os
from pathlib import Path

from polygraft.kernels.common.lines import LineFile, keep_newest


def a_log(folder: Path, name: str, *, at: float) -> Path:
    log = folder / name / "steps.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("{}\n")
    os.utime(log, (at, at))
    return log


def test_a_long_log_goes_on_in_a_new_file_and_keeps_the_one_before(tmp_path: Path) -> None:
    lines = [f"{number:03}" for number in range(25)]
    for part in (lines[:12], lines[12:]):  # the second writer goes on where the first one stopped
        log = LineFile(tmp_path / "log", most_bytes=40)
        for line in part:
            log.write(line)
        log.close()
    assert (tmp_path / "log").read_text().splitlines() == lines[20:]
    assert (tmp_path / "log.1").read_text().splitlines() == lines[10:20]
    assert {path.name for path in tmp_path.iterdir()} == {"log", "log.1"}


def test_a_line_that_is_longer_than_a_file_may_be_has_one_to_itself(tmp_path: Path) -> None:
    log = LineFile(tmp_path / "log", most_bytes=4)
    for line in ("a line", "another"):
        log.write(line)
    log.close()
    assert [(tmp_path / name).read_text() for name in ("log.1", "log")] == ["a line\n", "another\n"]


def test_old_logs_go_and_the_newest_and_those_being_written_stay(tmp_path: Path) -> None:
    a_log(tmp_path, "fresh", at=4e9)
    old = {name: a_log(tmp_path, name, at=float(at)) for at, name in enumerate(("first", "second", "third"))}
    old["first"].with_name("steps.jsonl.1").write_text("{}\n")
    (old["second"].parent / "manifest.json").write_text("{}")
    keep_newest(tmp_path, "steps.jsonl", most=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "second", "third"]
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["manifest.json"]
    keep_newest(tmp_path, "steps.jsonl", most=0, idle_s=0.0)
    assert (tmp_path / "fresh").exists() and not (tmp_path / "third").exists()


def test_where_there_are_no_logs_nothing_happens(tmp_path: Path) -> None:
    keep_newest(tmp_path / "missing", "steps.jsonl", most=0)
    assert not list(tmp_path.iterdir())
