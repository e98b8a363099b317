"""The step log: one JSON line a packed step, the proof of who rode together."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from polygraft.kernels.common.lines import LineFile, keep_newest
from polygraft.trainers.runner import PackStep

NAME = "steps.jsonl"


class StepLog:
    """Appends to `steps.jsonl` in the pack's folder; `device` is what the pack computes on. Logs of packs that are long
    over make room for it."""

    def __init__(self, folder: Path, device: str) -> None:
        self._device = device
        keep_newest(folder.parent, NAME)
        self._file = LineFile(folder / NAME)

    def write(self, step: PackStep, methods: Mapping[str, str]) -> None:
        """`methods` maps a job to the text of its graft."""
        line = {
            "step": step.number,
            "time": time.time(),
            "seconds": round(step.seconds, 4),
            "rows": step.rows,
            "jobs": list(step.jobs),
            "methods": sorted({methods[job] for job in step.jobs}),
            "device": self._device,
        }
        self._file.write(json.dumps(line))

    def close(self) -> None:
        self._file.close()
