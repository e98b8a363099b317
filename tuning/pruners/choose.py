"""Pruners by name."""

from __future__ import annotations

from typing import Literal

from polygraft.tuning.pruners.curves import Pruner
from polygraft.tuning.pruners.halving import RUNGS, Halving

PrunerName = Literal["none", "halving", "hyperband", "early-exit"]


def pruner(name: PrunerName) -> Pruner | None:
    match name:
        case "none":
            return None
        case "halving":
            return Halving()
        case "hyperband":
            return Halving(brackets=RUNGS + 1)
        case "early-exit":
            from polygraft.tuning.pruners.early_exit import EarlyExit  # scipy, a third of a second

            return EarlyExit()
