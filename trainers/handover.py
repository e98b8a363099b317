"""What a job takes to another pack beside its checkpoint: the deaths of workers that it was underway in, so that who is
suspected here is suspected there."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from polygraft.kernels.common.atomic import write_text
from polygraft.trainers.blame import Seen

_NAME = "suspected.json"


def write(folder: Path, seen: Seen | None) -> None:
    """Into the job's folder; None: it is not suspected."""
    if seen is None:
        (folder / _NAME).unlink(missing_ok=True)
    else:
        write_text(folder / _NAME, json.dumps(asdict(seen)))


def read(folder: Path) -> Seen | None:
    """What the pack before wrote, if the job comes from one."""
    try:
        return Seen(**json.loads((folder / _NAME).read_text()))
    except FileNotFoundError:
        return None
