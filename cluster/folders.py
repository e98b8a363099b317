"""Where files, grafts, jobs and packs lie under the data folder; what writes there and what reads there ask here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Folders:
    """Under the data folder."""

    data: Path

    @property
    def files(self) -> Path:
        return self.data / "files"

    @property
    def grafts(self) -> Path:
        return self.data / "grafts"

    def job(self, job: str) -> Path:
        return self.data / "jobs" / job

    @property
    def rungs(self) -> Path:
        return self.data / "rungs"

    def rung(self, job: str) -> Path:
        """What a job that ended at a rung left for those that go on from it."""
        return self.rungs / job

    def pack(self, pack: str) -> Path:
        return self.data / "packs" / pack
