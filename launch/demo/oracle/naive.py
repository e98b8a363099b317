"""A graft alone, by hooks on transformers' model: each method as its paper's equation, with nothing of ours
underneath."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from polygraft.launch.demo.oracle.plain import SHARED, Oracle, Place, module_of, plain_llama, read, split
from polygraft.launch.demo.oracle.prefixed import prefix

Parts = Mapping[str, Tensor]
Hook = Callable[[nn.Module, Parts], None]
CACHELESS = ("vit", "t5")  # classes that take no keys and values from elsewhere


def lora(scale: float) -> Hook:
    """h = W x + (alpha / r) B A x (Hu et al. 2021, eq. 3)."""
    return after(lambda x, y, p: y + scale * (x @ p["A"].T) @ p["B"])


def ia3_after() -> Hook:
    """Keys and values scaled elementwise (Liu et al. 2022, section 3.3)."""
    return after(lambda x, y, p: y * p["g"])


def ia3_before() -> Hook:
    """The feed-forward's hidden vector scaled before the second projection (Liu et al. 2022, section 3.3)."""

    def hook(module: nn.Module, parts: Parts) -> None:
        module.register_forward_pre_hook(lambda _, args: (args[0] * parts["g"], *args[1:]))

    return hook


def bitfit() -> Hook:
    """W x + b with only b trained (Ben Zaken et al. 2022, section 3)."""
    return after(lambda x, y, p: y + p["b"])


def serial() -> Hook:
    """h + W_up gelu(W_down h) on a sublayer's output h (Houlsby et al. 2019, figure 2), without biases."""
    return after(lambda x, y, p: y + F.gelu(y @ p["A"].T) @ p["B"])


def parallel(scale: float) -> Hook:
    """h + s relu(x W_down) W_up with x the sublayer's input (He et al. 2022, table 1)."""
    return after(lambda x, y, p: y + scale * F.relu(x @ p["A"].T) @ p["B"])


def after(equation: Callable[[Tensor, Tensor, Parts], Tensor]) -> Hook:
    """The hook that puts equation(x, y, parts) in place of a module's output y for its input x."""

    def hook(module: nn.Module, parts: Parts) -> None:
        def forward(_: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], out: object) -> object:
            x = args[0] if args else kwargs["hidden_states"]
            if isinstance(out, tuple):
                return equation(x, out[0], parts), *out[1:]
            assert isinstance(out, Tensor)
            return equation(x, out, parts)

        module.register_forward_hook(forward, with_kwargs=True)

    return hook


def naive(folder: Path, hooks: Mapping[int, Hook], values: Mapping[str, Tensor], dtype: torch.dtype) -> Oracle:
    """The model with `values` as leaves; `hooks` says which equation each slot is, in the order they are to apply.

    A slot's k and v parts need no hook: they are rows before every layer's cached keys and values (Li & Liang 2021,
    eq. 3), so the prompt's positions start after them.
    """
    model = plain_llama(folder, dtype)
    leaves = {name: value.to(dtype).requires_grad_() for name, value in values.items()}
    attach(model, hooks, leaves)
    rows = {split(name)[1:]: leaf for name, leaf in leaves.items() if split(name)[2] == "kv"}

    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    if model.config.model_type in CACHELESS and rows:
        prefix(model, {(layer, part): leaf for (layer, _, part), leaf in rows.items()})
        rows = {}

    def logits(ids: Tensor) -> Tensor:
        if not rows:
            return read(model, ids)
        cache = DynamicCache(config=model.config)
        for layer in range(model.config.num_hidden_layers):
            k, v = (_heads(rows[layer, "kv", part], heads) for part in ("k", "v"))
            cache.update(k, v, layer)
        return read(model, ids, past_key_values=cache, use_cache=True)

    return Oracle(logits, {name: Place(leaf) for name, leaf in leaves.items()})


def attach(model: nn.Module, hooks: Mapping[int, Hook], leaves: Parts) -> None:
    """Put every slot's hook on the modules of its sites; it gets the tensors of one site, and with them those that its
    slot shares between all sites."""
    for slot, hook in hooks.items():
        sites: dict[tuple[int, str], dict[str, Tensor]] = {}
        for name, leaf in leaves.items():
            owner, layer, site, part = split(name)
            if owner == slot and site != SHARED:
                sites.setdefault((layer, site), {})[part] = leaf
        for name, leaf in leaves.items():
            owner, _, site, part = split(name)
            for parts in sites.values() if owner == slot and site == SHARED else ():
                parts[part] = leaf
        for (layer, site), parts in sites.items():
            hook(model.get_submodule(_place(model, layer, site)), parts)


def _place(model: nn.Module, layer: int, site: str) -> str:
    """An encoder that a decoder follows has a last norm of its own."""
    before = site == "norm.final" and layer + 1 < len(list(model.get_submodule("model.layers").children()))
    return "model.encoder_norm" if before else module_of(layer, site)


def _heads(rows: Tensor, heads: int) -> Tensor:
    """[1, heads, p, head_dim] of rows [p, heads * head_dim]."""
    return rows.view(len(rows), heads, -1).transpose(0, 1).unsqueeze(0)
