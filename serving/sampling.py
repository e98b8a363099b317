"""Which token follows: the likeliest, or one drawn at a temperature from the nucleus (top_p).

A draw uses no generator state: its uniform number is a hash of (request seed, choice, token index), so a stream
depends on neither its neighbours nor the replica and step that happen to compute it. The nucleus is that of Holtzman
et al. 2020, arXiv 1904.09751, eq. 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

_GREEDY_BELOW = 1e-4  # dividing logits by less than this overflows fp32 and picks the maximum anyway
_HEAD = 512  # a nucleus is looked for among this many likeliest tokens before the whole vocabulary is sorted


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is sampled."""

    temperature: float
    top_p: float
    seed: int
    choice: int
    index: int


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """One token a row of `logits` [n, vocab] fp32; None for a row that holds a NaN or an infinity.

    Here the host waits for the device, whose likeliest tokens it takes; where a token is drawn, for the row's logits.
    """
    # What is not finite stays so in a sum; one pass in place of four.
    finite = torch.isfinite(logits.sum(dim=1))
    likeliest: list[int] = torch.where(finite, logits.argmax(dim=1), -1).cpu().tolist()
    tokens: list[int | None] = [token if token >= 0 else None for token in likeliest]
    rows = [row for row, draw in enumerate(draws) if draw.temperature >= _GREEDY_BELOW and tokens[row] is not None]
    if rows:
        chosen = [draws[row] for row in rows]
        for row, token in zip(rows, _drawn(logits[rows].cpu(), chosen), strict=True):
            tokens[row] = token
    return tokens


def uniform(seed: int, choice: int, index: int) -> float:
    """A number in [0, 1) for token `index` of choice `choice`: 53 bits of a hash."""
    text = f"{seed}/{choice}/{index}".encode()
    return (int.from_bytes(blake2b(text, digest_size=8).digest()) >> 11) * 2.0**-53


def _drawn(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Inverse-CDF draws from softmax(logits / temperature), over the likeliest whose mass first reaches top_p."""
    temperature = torch.tensor([[draw.temperature] for draw in draws])
    probabilities = torch.softmax((logits - logits.amax(dim=1, keepdim=True)) / temperature, dim=1)
    tokens: list[int] = []
    for row, draw in zip(probabilities, draws, strict=True):
        at = uniform(draw.seed, draw.choice, draw.index)
        if draw.top_p >= 1.0:
            tokens.append(_inverse(row.double().cumsum(0), at))
            continue
        values, ids = row.topk(min(_HEAD, row.numel()))
        mass = values.double().cumsum(0)
        if float(mass[-1]) < draw.top_p:
            values, ids = row.sort(descending=True, stable=True)
            mass = values.double().cumsum(0)
        size = min(int(torch.searchsorted(mass, draw.top_p)) + 1, mass.numel())
        tokens.append(int(ids[_inverse(mass[:size], at)]))
    return tokens


def _inverse(mass: Tensor, at: float) -> int:
    """First index whose cumulative mass passes `at` times the total."""
    return min(int(torch.searchsorted(mass, at * float(mass[-1]), right=True)), mass.numel() - 1)
