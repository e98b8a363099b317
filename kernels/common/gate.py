"""How a row weighs experts by its scores, w = gate(x G^T)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polygraft.kernels.common.pointwise import sigmoid


@dataclass(frozen=True, slots=True)
class Gate:
    """Weights of a row's experts from its scores: each its own `sigmoid`, or a `softmax` over all of them, or over the
    `top` highest (0: all), the others being 0; or the softmax of `attention`, whose scores of `experts` are what their
    hidden values and as many numbers of the row have in common (AdapterFusion, Pfeiffer et al. 2021)."""

    kind: str
    top: int = 0
    experts: int = 0

    def scores(self, read_TG: Tensor, hidden_TR: Tensor) -> Tensor:
        """[T, experts] of read = x G^T, G having a row for every expert or, for attention, for every rank."""
        if self.kind != "attention":
            return read_TG
        return torch.unflatten(read_TG * hidden_TR, 1, (self.experts, -1)).sum(-1)

    def weights(self, scores_TE: Tensor) -> Tensor:
        """[T, experts]; differentiable. A score that is among the highest at a tie is chosen by its place."""
        if self.kind == "sigmoid":
            return sigmoid(scores_TE)
        if 0 < self.top < scores_TE.shape[1]:
            chosen = scores_TE.topk(self.top, dim=1).indices
            out = torch.ones_like(scores_TE, dtype=torch.bool).scatter_(1, chosen, False)
            scores_TE = scores_TE.masked_fill(out, -torch.inf)
        return torch.softmax(scores_TE, dim=1)

    def slope(self, grad_TE: Tensor, weights_TE: Tensor) -> Tensor:
        """The gradient of the scores from that of the weights."""
        if self.kind == "sigmoid":
            return grad_TE * weights_TE * (1 - weights_TE)
        return weights_TE * (grad_TE - (grad_TE * weights_TE).sum(1, keepdim=True))
