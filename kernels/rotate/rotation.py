"""Which rotation the op does, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Rotation:
    """R of `rotate`: `blocks` of `size` in so many `stages`; identity plus `lowrank`; or `pairs` of channels in groups
    of `size`."""

    kind: Literal["blocks", "lowrank", "pairs"]
    size: int = 0
    stages: int = 1
