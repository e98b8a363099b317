"""Next-token cross-entropy through the frozen head, a few rows at a time: float32 logits of the whole batch never
exist."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.linears.choose import HEAD_BLOCK
from polygraft.kernels.cross_entropy.op import replace_by_slope

CHUNK = HEAD_BLOCK  # rows whose logits exist at a time


def token_losses(backbone: Backbone, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """-log p(target) of every row, [N] in float32 or wider. No gradient."""
    parts = [
        F.cross_entropy(backbone.logits(hidden_ND[i : i + CHUNK]), targets_N[i : i + CHUNK], reduction="none")
        for i in range(0, len(hidden_ND), CHUNK)
    ]
    return torch.cat(parts) if parts else hidden_ND.new_zeros(0)


def judged_tokens(backbone: Backbone, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """`token_losses`, and the likeliest token of every row, [N]; of several equal ones the first. No gradient."""
    losses, likeliest = [hidden_ND.new_zeros(0)], [targets_N[:0]]
    for i in range(0, len(hidden_ND), CHUNK):
        logits = backbone.logits(hidden_ND[i : i + CHUNK])
        losses.append(F.cross_entropy(logits, targets_N[i : i + CHUNK], reduction="none"))
        likeliest.append(logits.argmax(dim=1))
    return torch.cat(losses[1:] or losses), torch.cat(likeliest)


def losses_and_gradient(
    backbone: Backbone, hidden_ND: Tensor, targets_N: Tensor, factors_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Row losses [N] and d(sum of factor * loss) / d hidden [N, hidden], row by row independent of the other rows.

    The head is frozen, so the gradient is ready as soon as the logits are; they are freed chunk by chunk.
    """
    losses, gradients = [], []
    for i in range(0, len(hidden_ND), CHUNK):
        rows = slice(i, i + CHUNK)
        logits = backbone.head.output(hidden_ND[rows])
        losses.append(replace_by_slope(logits, targets_N[rows], factors_N[rows], backbone.cap))
        gradients.append(backbone.head.transposed_product(logits))
    return torch.cat(losses), torch.cat(gradients)
