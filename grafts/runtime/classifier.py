"""What a graft's classifier makes of hidden states, in training and serving alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def label_logits(parts: Mapping[str, Tensor], rows_ND: Tensor) -> Tensor:
    """[N, classes] of hidden states [N, hidden], in the dtype of the head's tensors (`Head.parts`), fp32 or wider."""
    read = rows_ND.to(parts["weight"].dtype)
    if "dense.weight" in parts:
        read = torch.tanh(F.linear(read, parts["dense.weight"], parts["dense.bias"]))
    return F.linear(read, parts["weight"], parts.get("bias"))
