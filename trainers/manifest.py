"""The pack's manifest: which jobs it holds, at which checkpoint each, and how far its command stream is read.

After a crash the pack is rebuilt from it alone: it pins every job to one pack step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from polygraft.kernels.common.atomic import write_text
from polygraft.trainers.blame import Blame, Seen

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """`cursor` is the last command taken in, `closing` whether one of them was close; `jobs` maps a job to its
    checkpoint's name, None for one at its start; `blame` is for the workers that were killed.
    """

    step: int = 0
    cursor: str = "0-0"
    closing: bool = False
    jobs: Mapping[str, str | None] = field(default_factory=dict)
    blame: Blame = field(default_factory=Blame)

    def save(self, folder: Path) -> None:
        write_text(folder / "manifest.json", json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1))

    @staticmethod
    def load(folder: Path) -> Manifest:
        """The last one saved; an empty one for a new pack. Raises ValueError for another schema."""
        try:
            state = json.loads((folder / "manifest.json").read_text())
        except FileNotFoundError:
            return Manifest()
        if state.pop("schema") != SCHEMA:
            raise ValueError(f"{folder.name}/manifest.json is not of schema {SCHEMA}")
        blame = state.pop("blame", {"deaths": 0, "seen": {}})
        seen = {job: Seen(**one) for job, one in blame["seen"].items()}
        return Manifest(**state, blame=Blame(blame["deaths"], seen))
