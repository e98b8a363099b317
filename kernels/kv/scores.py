"""What makes a score of a query and a key."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scores:
    """score = scaling * q k, of which a query sees the last `window` keys up to its own (None: all of them).

    Keys count by their position in the sequence, whose prefix rows come first and slide out of the window, too.
    """

    scaling: float
    window: int | None = None
