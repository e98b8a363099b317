"""What makes a score of a query and a key."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """score[t, c] = bent(scaling * q[t] k[c]) + bias[head, t, c], of which query t sees the last `window` keys up to
    its own (None: all of them); bent(s) = cap tanh(s / cap), or s without a `cap` (Gemma 2).

    t and c are positions in the sequence, whose prefix rows come first and slide out of the window, too. `bias` is
    frozen and reaches as far as the longest bucket; a model with relative positions has one (T5).
    """

    scaling: float
    window: int | None = None
    bias: Tensor | None = None
    cap: float | None = None
