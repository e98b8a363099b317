"""Next-token cross-entropy through the frozen head, a few rows at a time: float32 logits of the whole batch never
exist."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.linears.choose import HEAD_BLOCK

CHUNK = HEAD_BLOCK  # rows whose logits exist at a time
SLICE = 32  # of them in float32


def token_losses(backbone: Backbone, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """-log p(target) of every row, [N] in float32 or wider. No gradient."""
    parts = [
        F.cross_entropy(backbone.logits(hidden_ND[i : i + CHUNK]), targets_N[i : i + CHUNK], reduction="none")
        for i in range(0, len(hidden_ND), CHUNK)
    ]
    return torch.cat(parts) if parts else hidden_ND.new_zeros(0)


def losses_and_gradient(
    backbone: Backbone, hidden_ND: Tensor, targets_N: Tensor, factors_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Row losses [N] and d(sum of factor * loss) / d hidden [N, hidden], row by row independent of the other rows.

    The head is frozen, so the gradient is ready as soon as the logits are; they are freed chunk by chunk.
    """
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    workspace = hidden_ND.new_empty(SLICE, backbone.head.out_features, dtype=wide)
    losses, gradients = [], []
    for i in range(0, len(hidden_ND), CHUNK):
        count = min(CHUNK, len(hidden_ND) - i)
        logits = backbone.head.output(hidden_ND[i : i + count])
        for j in range(0, count, SLICE):
            rows = slice(i + j, min(i + j + SLICE, i + count))
            part = logits[j : j + rows.stop - rows.start]
            losses.append(_replace_by_slope(part, targets_N[rows], factors_N[rows], workspace, backbone.cap))
        gradients.append(backbone.head.transposed_product(logits))
    return torch.cat(losses), torch.cat(gradients)


def _replace_by_slope(
    logits_NV: Tensor, targets_N: Tensor, factors_N: Tensor, workspace: Tensor, cap: float | None
) -> Tensor:
    """-log p(target) of the rows; the logits become factor * d loss / d logits, rounded once to their dtype."""
    logs = workspace[: len(logits_NV)].copy_(logits_NV)
    bend = None
    if cap is not None:
        bend = logs.div_(cap).tanh_().clone()
        logs.mul_(cap)
    torch._log_softmax(logs, 1, False, out=logs)
    losses = -logs.gather(1, targets_N.unsqueeze(1)).squeeze(1)
    slope = logs.exp_()
    slope.scatter_add_(1, targets_N.unsqueeze(1), slope.new_full((len(targets_N), 1), -1.0))
    if bend is not None:
        slope.mul_(1 - bend.square_())
    logits_NV.copy_(slope.mul_(factors_N.unsqueeze(1)))
    return losses
