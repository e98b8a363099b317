"""The step log: one JSON line for every step of a replica, which proves what was mixed with what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from polygraft.cluster.store.base import JSON


class StepLog:
    """Appends to a file, a line a write, so that readers and a killed process see whole lines."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, step: Mapping[str, JSON]) -> None:
        self._file.write(json.dumps(step, separators=(",", ":")) + "\n")

    def close(self) -> None:
        self._file.close()
