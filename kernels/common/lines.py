"""A log file of whole lines: its writer goes on when the disk is full, and it takes no more than its share of it."""

from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from polygraft.kernels.common.atomic import move
from polygraft.kernels.common.room import is_full

_LOG = logging.getLogger(__name__)
MOST_BYTES = 32 << 20  # of a file; the lines before those in it are in the one beside it, as many again at most
KEPT, KEPT_S = 100, 86400.0


class LineFile:
    """Appends to a file, which is made with its folder by the first line; a line is one write, so that readers and a
    killed process see whole lines. A file that has become long is named NAME.1, in place of the one before."""

    def __init__(self, path: Path, *, most_bytes: int = MOST_BYTES) -> None:
        self._path = path
        self._most = most_bytes
        self._handle: int | None = None
        self._bytes = 0
        self._lossy = False

    def write(self, line: str) -> None:
        """A line without its end. Where there is no room it is dropped, with a warning for the first. Raises OSError
        for any other reason."""
        try:
            self._append(f"{line}\n".encode())
            self._lossy = False
        except OSError as error:
            if not is_full(error):
                raise
            if not self._lossy:
                _LOG.warning("%s: %s; lines are dropped until there is room", self._path, error)
            self._lossy = True

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _append(self, line: bytes) -> None:
        handle = self._open() if self._handle is None else self._handle
        if self._bytes and self._bytes + len(line) > self._most:
            self.close()
            move(self._path, self._path.with_name(f"{self._path.name}.1"))
            handle = self._open()
        written = os.write(handle, line)
        if written < len(line):  # the disk took the line's beginning, which is taken back, and no more
            os.ftruncate(handle, os.lseek(handle, 0, os.SEEK_END) - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._bytes += written

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._bytes = os.fstat(self._handle).st_size
        return self._handle


def keep_newest(folder: Path, name: str, *, most: int = KEPT, idle_s: float = KEPT_S) -> None:
    """Of the logs `name` in the folders in `folder`, leave the `most` that were written last, and those that somebody
    has written to within `idle_s`. A folder that has nothing else in it goes, too. What another process removes at the
    same time, or what cannot be removed, is passed over."""
    found: list[tuple[float, Path]] = []
    for log in folder.glob(f"*/{name}"):
        with suppress(OSError):
            found.append((log.stat().st_mtime, log))
    before = time.time() - idle_s
    for at, log in sorted(found, reverse=True)[most:]:
        if at < before:
            with suppress(OSError):
                for old in (log, log.with_name(f"{name}.1")):
                    old.unlink(missing_ok=True)
                log.parent.rmdir()
