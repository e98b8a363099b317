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


def prefix(model: PreTrainedModel, rows: Mapping[tuple[int, str], Tensor]) -> None:
    """Let the model's self-attention see `rows` [p, heads * head_dim], by layer and part (k or v), too. Positions that
    bias scores count from the prefix on, as they would with a cache."""
    name, turns = f"prefixed{next(_NUMBERS)}", cycle(_layers(model))
    biased: list[nn.Module] = []

    def attend(  # noqa: PLR0913  (transformers' signature)
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        position_bias: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        layer = next(turns)
        pk, pv = (None if layer is None else rows.get((layer, part)) for part in "kv")
        k, v = _after(pk, key), _after(pv, value)
        scores, length, before = scaling * query @ k.transpose(2, 3), query.shape[2], k.shape[2] - key.shape[2]
        if getattr(module, "has_relative_attention_bias", False):
            biased[:] = [module]  # the others of its stack share its bias
        if position_bias is not None and layer is not None:
            scores = scores + biased[0].compute_bias(length, length + before, past_seen_tokens=before)  # type: ignore[operator]
        if mask is not None:
            scores = scores + F.pad(mask, (before, 0))
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    for module in model.modules():  # an encoder and a decoder have configs of their own
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = name


def _layers(model: PreTrainedModel) -> list[int | None]:
    """The layers of its attentions in the order they are called, None for those that attend to an encoder's states."""
    encoder = model.config.num_hidden_layers
    decoder = getattr(model.config, "num_decoder_layers", 0)
    return [*range(encoder), *(each for i in range(decoder) for each in (encoder + i, None))]


def _after(rows: Tensor | None, own: Tensor) -> Tensor:
    """The keys or values [1, heads, p + n, head_dim] of a sequence with those of its prefix before them."""
    if rows is None:
        return own
    return torch.cat([torch.unflatten(rows, 1, (own.shape[1], -1)).transpose(0, 1)[None], own], 2)
