"""What makes a score of a query and a key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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

    def bent(self, scores: Tensor) -> tuple[Tensor, Tensor | float]:
        """bent(s), and its slope there."""
        if self.cap is None:
            return scores, 1.0
        turned = torch.tanh(scores / self.cap)
        return self.cap * turned, 1 - turned.square()
