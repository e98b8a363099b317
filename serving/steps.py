"""The step log: one JSON line for every step of a replica, which proves what was mixed with what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from polygraft.cluster.store.base import JSON
from polygraft.kernels.common.lines import LineFile


class StepLog:
    """Appends to a file; serving goes on where there is no room for a line."""

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)

    def write(self, step: Mapping[str, JSON]) -> None:
        self._file.write(json.dumps(step, separators=(",", ":")))

    def close(self) -> None:
        self._file.close()
