"""Prefixes in models whose classes take no cache: every layer's rows stand before the keys and values of its attention
(Li & Liang 2021, eq. 3)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, cycle

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NUMBERS = count()


def prefix(model: PreTrainedModel, rows: Mapping[tuple[int, str], Tensor], layers: int) -> None:
    """Let the model attend to `rows` [p, heads * head_dim], by layer and part (k or v), too. Its attentions are called
    in the order of its layers."""
    name, turns = f"prefixed{next(_NUMBERS)}", cycle(range(layers))

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: object
    ) -> tuple[Tensor, None]:
        layer = next(turns)
        k, v = (_after(rows.get((layer, part)), own) for part, own in (("k", key), ("v", value)))
        scores = scaling * query @ k.transpose(2, 3)
        if mask is not None:
            scores = scores + F.pad(mask, (k.shape[2] - key.shape[2], 0))
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.config._attn_implementation = name


def _after(rows: Tensor | None, own: Tensor) -> Tensor:
    """The keys or values [1, heads, p + n, head_dim] of a sequence with those of its prefix before them."""
    if rows is None:
        return own
    return torch.cat([torch.unflatten(rows, 1, (own.shape[1], -1)).transpose(0, 1)[None], own], 2)
