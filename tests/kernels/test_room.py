"""Files on a disk without room: whole lines, whole folders, and writes that wait."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from polygraft.grafts.formats.tensor_file import write_tensors
from polygraft.kernels.common.atomic import whole_folder
from polygraft.kernels.common.lines import LineFile
from polygraft.kernels.common.room import free_bytes, is_full, when_there_is_room
from tests.small_disk import SmallDisk, small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", mib=1) as disk:
        yield disk


def test_lines_are_dropped_whole_while_there_is_no_room(disk: SmallDisk) -> None:
    log = LineFile(disk.folder / "folder" / "log")
    disk.fill()
    log.write("before there is a file")
    disk.make_room()
    lines = [f"{number:0500d}" for number in range(64)]
    log.write(lines[0])
    disk.fill(leaving=8192)
    for line in lines[1:-1]:
        log.write(line)
    disk.make_room()
    log.write(lines[-1])
    log.close()
    kept = (disk.folder / "folder" / "log").read_text().splitlines()
    assert kept[0] == lines[0] and kept[-1] == lines[-1]
    assert kept == [line for line in lines if line in kept]
    assert 2 < len(kept) < len(lines)


def test_tensors_that_find_no_room_leave_no_draft_and_say_so(disk: SmallDisk) -> None:
    values = {"w": torch.zeros(1 << 20)}
    with pytest.raises(OSError) as caught, whole_folder(disk.folder / "graft") as draft:  # noqa: PT011  (asked below)
        write_tensors(values, draft / "w.safetensors")
    assert caught.value.errno == errno.ENOSPC and is_full(caught.value)
    assert not list(disk.folder.iterdir())


def test_a_write_waits_until_there_is_room(disk: SmallDisk) -> None:
    disk.fill()
    assert free_bytes(disk.folder) == 0
    waited: list[float] = []
    told: list[BaseException] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            disk.make_room()

    def write() -> str:
        (disk.folder / "file").write_bytes(b"x" * 4096)
        return "written"

    assert when_there_is_room(write, told=told.append, wait=wait) == "written"
    assert len(waited) == 3 and len(told) == 1


def test_other_failures_are_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        when_there_is_room(lambda: (tmp_path / "missing").read_text(), wait=lambda _: pytest.fail("it waited"))
