"""What a search stands on, as the HTTP API hands it to who makes its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from polygraft.grafts.sites import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """A backbone, by its name; `data` is the search's training file if that is there, `earlier` has the records of the
    studies that it may take something over from."""

    backbone: str
    shape: ModelShape
    quantised: bool
    data: Path | None = None
    earlier: Mapping[str, str] = field(default_factory=dict)
