"""Prompts that are a function of the whole input."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.grafts.oracle.row import Row, Values
from tests.grafts.packing import PROMPT


def routed(ids: Tensor, x: Tensor, p: Values, prompt: int = PROMPT) -> Tensor:
    """[p_c P_c; E(x)] with p = softmax(L mean E(x)), c = argmax p (Choi et al. 2023, "Sparse Mixture-of-Prompts")."""
    P, L = p["0.0.embed.p"], p["0.0.embed.G"]
    shares = torch.softmax(torch.stack([row.dot(x[:prompt].mean(0)) for row in L]), 0)
    chosen, length = int(shares.argmax()), len(P) // len(L)
    return torch.cat([shares[chosen] * P[chosen * length : (chosen + 1) * length], x])


def generated(ids: Tensor, x: Tensor, p: Values, prompt: int = PROMPT) -> Tensor:
    """[W2 ReLU(W1 M(x) + b1) + b2; E(x)] with M(x) = mean E(x) (Wu et al. 2022, "Instance-Dependent Generation"). Ours
    keeps W2^T as one prompt for every hidden unit."""
    W1, b1, b2 = (p[f"0.0.embed.{part}"] for part in ("G", "a", "c"))
    W2 = p["0.0.embed.p"].reshape(len(W1), -1).T
    hidden = torch.relu(W1 @ x[:prompt].mean(0) + b1[:, 0])
    return torch.cat([(W2 @ hidden + b2.flatten()).reshape(b2.shape), x])


ROWS: Mapping[str, Row] = {
    "smop": Row("smop(4, k=3)", soft=routed),
    "idpg": Row("idpg(3, hidden=6)", soft=generated),
}
