"""A log file of whole lines, whose writer goes on when the disk is full."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from polygraft.kernels.common.room import is_full

_LOG = logging.getLogger(__name__)


class LineFile:
    """Appends to a file, which is made with its folder by the first line; a line is one write, so that readers and a
    killed process see whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None
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
        if self._handle is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        written = os.write(self._handle, line)
        if written < len(line):  # the disk took the line's beginning, which is taken back, and no more
            os.ftruncate(self._handle, os.lseek(self._handle, 0, os.SEEK_END) - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
