"""Prefixes that a row weighs itself: attention is computed query by query over [gate * P; own rows], or over the two
apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from polygraft.launch.demo.oracle.naive import Hook, attach
from polygraft.launch.demo.oracle.plain import HEADS, Oracle, Place, module_of, plain_llama, read
from tests.grafts.oracle.family_mixes import gated_adapter, gated_lora
from tests.grafts.oracle.row import Row, Values

NAME = "oracle-of-gated-prefixes"
# From a layer, what its attention reads [T, D] and the tensors, W of its keys and values among them: prefix keys and
# values [T, P, kv_heads * head_dim], for every query its own.
Prefix = Callable[[int, Tensor, Values], tuple[Tensor, Tensor]]


def unipelt(layer: int, x: Tensor, p: Values) -> tuple[Tensor, Tensor]:
    """G_P P with G_P = sigmoid(W_G x) for keys and values alike (Mao et al. 2022, section 3), and P of layer l from
    W2_l tanh(W1 E + b1) + b2_l (Li & Liang 2021, section 4.3)."""
    E, W1, b1, W2, b2 = (p[f"2.shared.{part}"] for part in ("E", "W1", "b1", "W2", "b2"))
    made = (torch.tanh(E @ W1.T + b1) @ W2.T + b2).chunk(W2.shape[0] // (2 * E.shape[1]), dim=1)[layer]
    gate = torch.sigmoid(x @ p[f"2.{layer}.kv.G"][0])[:, None, None]
    keys, values = made.chunk(2, dim=1)
    return gate * keys, gate * values


def apt(layer: int, x: Tensor, p: Values) -> tuple[Tensor, Tensor]:
    """l a_i P_i with a = sigmoid(h W), a number for every prefix row (Zhang et al. 2023, section 3)."""
    gate = p[f"0.{layer}.kv.l"] * torch.sigmoid(x @ p[f"0.{layer}.kv.G"].T)[:, :, None]
    return gate * p[f"0.{layer}.kv.k"], gate * p[f"0.{layer}.kv.v"]


def llama_adapter(layer: int, x: Tensor, p: Values) -> tuple[Tensor, Tensor]:
    """[W_k P; g W_v P] for every query, in a softmax of their own (Zhang et al. 2023, section 3.2)."""
    P, gate = p[f"0.{layer}.kv.P"], p[f"0.{layer}.kv.gate"]
    keys, values = P @ p[f"{layer}.attn.k"].T, gate * (P @ p[f"{layer}.attn.v"].T)
    return keys.expand(len(x), -1, -1), values.expand(len(x), -1, -1)


def model(
    prefix: Prefix, hooks: Mapping[int, Hook], *, apart: bool = False
) -> Callable[[Path, Values, torch.dtype], Oracle]:
    """The oracle of such a prefix and of the slots with `hooks`; a prefix `apart` has a softmax of its own."""

    def make(folder: Path, values: Values, dtype: torch.dtype) -> Oracle:
        ALL_ATTENTION_FUNCTIONS.register(NAME, partial(_forward, apart=apart))
        base = plain_llama(folder, dtype)
        base.config._attn_implementation = NAME
        leaves = {name: value.to(dtype).requires_grad_() for name, value in values.items()}
        attach(base, hooks, leaves)
        latest: list[tuple[Tensor, Tensor]] = []  # the prefix of the attention that is to come
        for layer in range(base.config.num_hidden_layers):
            sites = ("attn.k", "attn.v")
            frozen = {f"{layer}.{site}": base.get_submodule(module_of(layer, site)).weight for site in sites}
            base.get_submodule(module_of(layer, "attn.q")).register_forward_pre_hook(
                lambda _, args, layer=layer, given={**leaves, **frozen}: latest.append(
                    prefix(layer, args[0].flatten(0, -2), given)
                )
            )
        # Its attention modules, which uniform.py hides on some architectures, have the config.
        setattr(base.config, NAME, latest.pop)
        return Oracle(lambda ids: read(base, ids), {name: Place(leaf) for name, leaf in leaves.items()})

    return make


def _forward(  # noqa: PLR0913
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: object,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    apart: bool = False,
    **_: object,
) -> tuple[Tensor, None]:
    pk, pv = (torch.unflatten(rows, -1, (key.shape[1], -1)) for rows in getattr(module.config, NAME)())
    group, out = query.shape[1] // key.shape[1], []
    for t in range(query.shape[2]):
        seen = key.shape[2] if module.config.model_type in HEADS else t + 1
        own = slice(max(0, seen - sliding_window) if sliding_window else 0, seen)
        parts = [(pk[t], pv[t]), (key[0, :, own].transpose(0, 1), value[0, :, own].transpose(0, 1))]
        heads = []
        for keys, values in parts if apart else [tuple(map(torch.cat, zip(*parts, strict=True)))]:
            for head in range(query.shape[1]):
                scores = scaling * keys[:, head // group] @ query[0, head, t]
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores  # Gemma 2
                heads.append(scores.softmax(0) @ values[:, head // group])
        out.append(torch.stack(heads).unflatten(0, (-1, query.shape[1])).sum(0))
    return torch.stack(out)[None], None


ROWS: Mapping[str, Row] = {
    "unipelt": Row(
        "unipelt(r=4, size=6, length=5, hidden=24)", model=model(unipelt, {0: gated_lora(), 1: gated_adapter()})
    ),
    "apt": Row("apt(6)", model=model(apt, {})),
}
