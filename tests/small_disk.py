"""A real file system of a few MiB that a test may fill: a tmpfs in a mount namespace of its own, reached through the
process that holds it, so that nothing is left mounted whatever becomes of the test."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

FILLER = ".filler"


@dataclass(frozen=True, slots=True)
class SmallDisk:
    folder: Path

    def fill(self, leaving: int = 0) -> None:
        """Use up all but `leaving` bytes."""
        with open(self.folder / FILLER, "ab", buffering=0) as filler:
            try:
                while self.free > leaving:
                    filler.write(bytes(min(1 << 16, max(4096, self.free - leaving))))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def make_room(self) -> None:
        (self.folder / FILLER).unlink()

    @property
    def free(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize


@contextmanager
def small_disk(at: Path, *, mib: int) -> Iterator[SmallDisk]:
    """Needs util-linux's unshare and a kernel that lets its user mount a tmpfs in a namespace, else the test is
    skipped."""
    at.mkdir(exist_ok=True)
    script = f"mount -t tmpfs -o size={mib}m none '{at}' && echo mounted && exec cat"
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        assert holder.stdin is not None and holder.stdout is not None and holder.stderr is not None
        try:
            if holder.stdout.readline() != b"mounted\n":
                pytest.skip(f"no tmpfs can be mounted here: {holder.stderr.read().decode().strip()}")
            yield SmallDisk(Path(f"/proc/{holder.pid}/root{at}"))
        finally:
            holder.stdin.close()  # ends the holder, and with it the namespace
