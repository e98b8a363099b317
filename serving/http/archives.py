"""A graft's folder as a tar archive: unpacked from a stranger's, and written for whoever exports it.

Of an archive, plain or gzipped, only the regular files of its one folder are read, or those that lie in none. What
could lead out of the target (absolute names, `..`), stand for something else (links, devices, sparse files) or grow
(more bytes or members than the limits, headers that hold texts of megabytes) is refused by its name, and so is one that
was cut off, even between two files; nothing is kept then. Folders inside are left out: no format of grafts has any.
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, BinaryIO, cast

from polygraft.cluster.validation import shown

_MEMBERS = 1_000
_PIECE = 1 << 20
_BLOCK = 512
_GZIP = b"\x1f\x8b"


class BadArchive(ValueError):
    """An archive that is not read; the message says why."""


class TooLarge(BadArchive):
    """An archive whose files are larger together than they may be."""


def unpack(archive: Path, target: Path, *, limit_bytes: int) -> None:
    """The archive's files into the new folder `target`. Raises BadArchive and OSError."""
    target.mkdir()
    with archive.open("rb") as file:
        zipped = file.read(2) == _GZIP
    try:
        if zipped:
            whole = target / ".archive"
            _gunzip(archive, whole, limit_bytes)
            _untar(whole, target, limit_bytes)
            whole.unlink()
        else:
            _untar(archive, target, limit_bytes)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, RecursionError) as error:
        if isinstance(error, BadArchive):
            raise
        raise BadArchive(f"not a whole tar archive, plain or gzipped: {str(error)[:200]}") from None


def packed(files: Sequence[tuple[str, BinaryIO]]) -> Iterator[bytes]:
    """A plain tar archive of open files, which are closed after it; the names are ours, the owners nobody."""
    with ExitStack() as opened:
        for _, file in files:
            opened.enter_context(file)
        for name, file in files:
            entry = tarfile.TarInfo(name)
            entry.size = left = file.seek(0, 2)
            file.seek(0)
            yield entry.tobuf(tarfile.USTAR_FORMAT)
            while left:
                piece = file.read(min(_PIECE, left))
                if not piece:
                    raise OSError(f"{name}: was cut while it was read")
                left -= len(piece)
                yield piece
            yield bytes(-entry.size % _BLOCK)
        yield bytes(2 * _BLOCK)


def _gunzip(archive: Path, target: Path, limit_bytes: int) -> None:
    left = limit_bytes + (2 + 2 * _MEMBERS) * _BLOCK
    with gzip.open(archive) as source, target.open("xb") as out:
        while piece := source.read(_PIECE):
            left -= len(piece)
            if left < 0:
                raise TooLarge(f"the archive holds more than the limit of {limit_bytes} bytes")
            out.write(piece)


def _untar(archive: Path, target: Path, limit_bytes: int) -> None:
    found = 0
    folders: set[str] = set()
    with archive.open("rb") as file, tarfile.open(fileobj=cast(BinaryIO, _Guarded(file)), mode="r:") as members:
        for count, member in enumerate(members):
            if count >= _MEMBERS:
                raise BadArchive(f"the archive has more than {_MEMBERS} members")
            parts = _parts(member)
            if member.isdir() or len(parts) > 2:
                continue
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
                raise BadArchive(f"{shown(member.name)}: is no regular file; leave links and devices out")
            found += member.size
            if found > limit_bytes:
                raise TooLarge(f"the archive's files are larger than the limit of {limit_bytes} bytes")
            folders.add(parts[0] if len(parts) == 2 else "")
            if len(folders) > 1:
                raise BadArchive("the archive holds files of more than one folder; pack one graft's")
            content = members.extractfile(member)
            assert content is not None  # as it is for a regular file
            _write(target / parts[-1], content, member)
        file.seek(members.offset)  # where tarfile stops, at what is no header, too
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise BadArchive("the archive has no end: it was cut off, or is damaged after its first files")
    if not folders:
        raise BadArchive("the archive holds no files")


def _write(path: Path, content: IO[bytes], member: tarfile.TarInfo) -> None:
    try:
        with path.open("xb") as out:
            shutil.copyfileobj(content, out, _PIECE // 4)
    except FileExistsError:
        raise BadArchive(f"{shown(member.name)}: is in the archive twice") from None
    if path.stat().st_size != member.size:
        raise BadArchive(f"{shown(member.name)}: is cut off")


def _parts(member: tarfile.TarInfo) -> list[str]:
    """The path's names. Raises BadArchive for one that leads elsewhere, or that a file system may not take."""
    name = member.name
    parts = [part for part in name.split("/") if part not in ("", ".")]
    odd = not name.isprintable() or "\\" in name or any(len(part.encode()) > 255 for part in parts)
    if name.startswith("/") or ".." in parts or odd or (parts and parts[-1].startswith(".archive")):
        raise BadArchive(f"{shown(name)}: is no plain path inside the archive")
    return parts


class _Guarded:
    """A file of which tarfile reads no more than a piece at a time: its headers may say that their text is as long as
    the archive, and it would be held in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _PIECE:
            raise BadArchive("the archive has a header of megabytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
