"""What a pack's worker is doing, for the next one to find if it is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_NAME = "underway.json"
_BYTES = 4096  # taken at the start, so that a disk that is full later takes what is noted


class Underway:
    """A file that says which jobs are in what the worker does now, and at which step each. It outlives the process and
    not the machine: it is written at every step and never synced. Where the disk does not take it, nobody is blamed."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o644)
        if os.fstat(self._handle).st_size < _BYTES:
            self.clear()

    def left(self) -> Mapping[str, int]:
        """What a worker before this one was doing when it was killed; nothing, if it was not."""
        text = os.pread(self._handle, os.fstat(self._handle).st_size, 0)
        try:
            found = json.loads(text or b"{}")
        except ValueError:  # the machine went down with it
            return {}
        return {str(job): int(step) for job, step in found.items()}

    def note(self, jobs: Mapping[str, int]) -> None:
        """These jobs, from here on."""
        text, written = json.dumps(dict(jobs)).encode(), os.fstat(self._handle).st_size
        with suppress(OSError):
            os.pwrite(self._handle, text.ljust(max(_BYTES, written)), 0)  # one call: a kill comes before or after it

    def clear(self) -> None:
        """Nothing that could be blamed on a job."""
        self.note({})

    def close(self) -> None:
        os.close(self._handle)
