"""How the projections of a backbone are quantised, in words: `nf4` rounds them (QLoRA), `loftq-R-T` alternates T times
between rounding and the best approximation of rank R of what that lost (LoftQ). Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass

PATTERN = r"^(nf4|loftq-[1-9][0-9]{0,3}-[1-9][0-9]?)$"


@dataclass(frozen=True, slots=True)
class Quantisation:
    """NF4 after `iterations` alternations with a `rank` (LoftQ, Li et al. 2023, algorithm 1); with 1 the rank has no
    part in it."""

    rank: int = 0
    iterations: int = 1

    @staticmethod
    def of(text: str) -> Quantisation:
        """Raises ValueError for other words than those of `PATTERN`."""
        if not re.match(PATTERN, text):
            raise ValueError(f"quantise: {text!r} is neither nf4 nor loftq-RANK-ITERATIONS")
        _, *numbers = text.split("-")
        return Quantisation(*map(int, numbers))
