"""The step log: one JSON line for every step of a replica, which proves what was mixed with what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from polygraft.cluster.store.base import JSON
from polygraft.kernels.common.lines import LineFile, keep_newest

NAME = "steps.jsonl"


class StepLog:
    """Appends to `steps.jsonl` in the replica's folder; serving goes on where there is no room for a line. Logs of
    replicas that are long gone make room for it."""

    def __init__(self, folder: Path) -> None:
        keep_newest(folder.parent, NAME)
        self._file = LineFile(folder / NAME)

    def write(self, step: Mapping[str, JSON]) -> None:
        self._file.write(json.dumps(step, separators=(",", ":")))

    def close(self) -> None:
        self._file.close()
