"""The embedded server's append-only file after a power cut: how much of it is whole, and cutting off the rest.

A file system may leave the end of a file that was being written to cut short, or filled up with zeros. What is cut off
then was never acknowledged: an acknowledged command is on disk whole, and so is everything before it.
"""

from __future__ import annotations

import fcntl
import mmap
import re
from dataclasses import dataclass
from pathlib import Path

from polygraft.cluster.store.base import StoreError
from polygraft.kernels.common.atomic import sync, whole_file

FOLDER, MANIFEST = "appendonlydir", "appendonly.aof.manifest"
_LATER = re.compile(rb"\r\n\*[0-9]+\r\n\$[0-9]+\r\n[A-Za-z]+\r\n")  # where another command begins


@dataclass(frozen=True, slots=True)
class Tail:
    """What lies after the last whole command of `file`, which has `size` bytes. `torn`: it is an unfinished command or
    zeros, or both in that order, as a power cut leaves them; else something else was written over the file."""

    file: Path
    whole: int
    size: int
    torn: bool

    @property
    def kept(self) -> Path:
        """Where the tail is kept when it is cut off."""
        return self.file.with_name(f"{self.file.name}.cut-at-{self.whole}")

    def __str__(self) -> str:
        return f"{self.size - self.whole} bytes after byte {self.whole} of {self.file}"


def tail(store: Path) -> Tail | None:
    """What is wrong with the newest file under a store's folder; None where it is whole, or there is none."""
    file = _newest(store / FOLDER)
    if file is None or not file.stat().st_size:
        return None
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        size = len(data)
        whole, torn = _whole(data, _without_zeros(data))
    return None if whole == size else Tail(file, whole, size, torn)


def cut(found: Tail) -> None:
    """Cut the tail off; it is kept beside the file, but for zeros at its end. Raises OSError."""
    with found.file.open("r+b") as opened:
        opened.seek(found.whole)
        with whole_file(found.kept, mode=0o600) as draft:
            draft.write_bytes(opened.read().rstrip(b"\0"))
        opened.truncate(found.whole)
    sync(found.file)


def cut_damaged(store: Path) -> Tail | None:
    """Cut off whatever the newest file has after its last whole command, and say what that was. Raises StoreError while
    a server runs on the folder."""
    if not store.is_dir():
        return None
    with (store / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(f"{store}: a server runs on this folder; stop it first") from None
        found = tail(store)
        if found is not None:
            cut(found)
        return found


def _newest(folder: Path) -> Path | None:
    """The file that the server appends to: the manifest's last one of type i."""
    try:
        lines = (folder / MANIFEST).read_text().splitlines()
    except FileNotFoundError:
        return None
    names = [words[1] for line in lines if (words := line.split()) and words[0] == "file" and words[-1] == "i"]
    file = folder / names[-1] if names else None
    return file if file is not None and file.is_file() else None


def _without_zeros(data: mmap.mmap) -> int:
    """How many bytes there are before the zeros at the end."""
    end = len(data)
    while end and not data[end - 1]:
        page = data[max(0, end - 4096) : end]
        end += len(page.rstrip(b"\0")) - len(page)
    return end


def _whole(data: mmap.mmap, end: int) -> tuple[int, bool]:
    """Where the last whole command, or transaction, before `end` ends, and whether what follows is only unfinished."""
    at, whole, in_transaction = 0, 0, False
    while at < end:
        try:
            at, name = _command(data, at, end)
        except EOFError:  # unless commands follow: then a length in the middle of the file is wrong
            return whole, _LATER.search(data, at + 1, end) is None
        except ValueError:
            return whole, False
        in_transaction = name == b"MULTI" or (in_transaction and name != b"EXEC")
        if not in_transaction:
            whole = at
    return whole, True


def _command(data: mmap.mmap, at: int, end: int) -> tuple[int, bytes]:
    """Where the command at `at` ends, and its name. Raises EOFError if that is beyond `end`, ValueError for no
    command."""
    if data[at] == ord("#"):  # a note of the time
        return _line(data, at, end)[0], b""
    at, count = _number(data, at, end, b"*")
    name = b""
    for index in range(count):
        at, length = _number(data, at, end, b"$")
        if at + length + 2 > end:
            raise EOFError
        if data[at + length : at + length + 2] != b"\r\n":
            raise ValueError
        if index == 0:
            name = data[at : at + length].upper()
        at += length + 2
    return at, name


def _number(data: mmap.mmap, at: int, end: int, sign: bytes) -> tuple[int, int]:
    if at >= end:
        raise EOFError
    if data[at : at + 1] != sign:
        raise ValueError
    at, line = _line(data, at, end)
    return at, int(line[1:])


def _line(data: mmap.mmap, at: int, end: int) -> tuple[int, bytes]:
    """Where the line ends, and what it says."""
    found = data.find(b"\r\n", at, min(end, at + 64))
    if found < 0:
        if end - at < 64 and b"\n" not in data[at:end]:
            raise EOFError
        raise ValueError
    return found + 2, data[at:found]
