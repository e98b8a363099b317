"""The step log: one JSON line for every step of a replica, which proves what was mixed with what."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from polygraft.cluster.store.base import JSON

_LOG = logging.getLogger(__name__)


class StepLog:
    """Appends to a file, a line a write, so that readers and a killed process see whole lines."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lossy = False
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, step: Mapping[str, JSON]) -> None:
        """A line that cannot be written (a full disk) is dropped, with a warning for the first: serving goes on."""
        try:
            self._file.write(json.dumps(step, separators=(",", ":")) + "\n")
        except OSError as error:
            if not self._lossy:
                _LOG.warning("%s: %s; steps go unlogged", self._file.name, error)
            self._lossy = True

    def close(self) -> None:
        self._file.close()
