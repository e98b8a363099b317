"""Which token follows: the likeliest, or one drawn at a temperature from those that min_p, top_k and top_p leave.

A draw uses no generator state: its uniform number is a hash of (request seed, choice, token index), so a stream
depends on neither its neighbours nor the replica and step that happen to compute it. The nucleus (top_p) is that of
Holtzman et al. 2020, arXiv 1904.09751, eq. 2; min_p that of Nguyen et al. 2024, arXiv 2407.01082, section 3.2. What
each leaves is shared out anew before the next, in vLLM's order: temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

_GREEDY_BELOW = 1e-4  # dividing logits by less than this overflows fp32 and picks the maximum anyway
_HEAD = 512  # what is left is looked for among this many likeliest tokens before the whole vocabulary is sorted


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is sampled. `top_k` 0 leaves all tokens, `min_p` is a share of the likeliest one's probability;
    `barred` tokens are never chosen."""

    temperature: float
    top_p: float
    seed: int
    choice: int
    index: int
    top_k: int = 0
    min_p: float = 0.0
    barred: tuple[int, ...] = ()


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """One token a row of `logits` [n, vocab] fp32; None for a row that holds a NaN or an infinity.

    Here the host waits for the device, whose likeliest tokens it takes; where a token is drawn, for the row's logits.
    """
    # What is not finite stays so in a sum; one pass in place of four.
    finite = torch.isfinite(logits.sum(dim=1))
    logits = _without_barred(logits, draws)
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


def _without_barred(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """`logits`, or where a row has barred tokens a copy in which these are -inf."""
    known = range(logits.shape[1])  # a backbone's files may name an end that it has no row for
    places = [(row, token) for row, draw in enumerate(draws) for token in draw.barred if token in known]
    if not places:
        return logits
    rows, tokens = zip(*places, strict=True)
    return logits.index_put((torch.tensor(rows), torch.tensor(tokens)), logits.new_tensor(-torch.inf))


def _drawn(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Inverse-CDF draws from softmax(logits / temperature), over the tokens that are left."""
    temperature = torch.tensor([[draw.temperature] for draw in draws])
    probabilities = torch.softmax((logits - logits.amax(dim=1, keepdim=True)) / temperature, dim=1)
    tokens: list[int] = []
    for row, draw in zip(probabilities, draws, strict=True):
        at = uniform(draw.seed, draw.choice, draw.index)
        if draw.top_p >= 1.0 and not draw.min_p and not 0 < draw.top_k < row.numel():
            tokens.append(_inverse(row.double().cumsum(0), at))
            continue
        ids, mass = _left(row, draw)
        tokens.append(int(ids[_inverse(mass, at)]))
    return tokens


def _left(row: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """The tokens that are left of a row of probabilities, likeliest first, and their cumulative mass in fp64.

    min_p and top_k (tokens as likely as the k-th among them) each leave what is above a floor; top_p the likeliest
    whose share of that mass first reaches it.
    """
    values, ids = row.topk(min(_HEAD, row.numel()))
    floor = draw.min_p * values[0]
    if 0 < draw.top_k < row.numel():
        floor = torch.maximum(floor, row.topk(draw.top_k).values[-1])
    count = int((row >= floor).sum())
    cut = count < row.numel()
    mass = values[:count].double().cumsum(0)
    if len(mass) < count and (cut or float(mass[-1]) < draw.top_p):
        values, ids = row.sort(descending=True, stable=True)
        mass = values[:count].double().cumsum(0)
    if draw.top_p < 1.0:
        share = draw.top_p * float(mass[-1]) if cut else draw.top_p
        mass = mass[: int(torch.searchsorted(mass, share)) + 1]
    return ids, mass


def _inverse(mass: Tensor, at: float) -> int:
    """First index whose cumulative mass passes `at` times the total."""
    return min(int(torch.searchsorted(mass, at * float(mass[-1]), right=True)), mass.numel() - 1)
