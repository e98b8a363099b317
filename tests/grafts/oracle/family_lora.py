"""LoRA with other starting values, frozen parts or matrices in the middle."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from torch import Tensor

from polygraft.launch.demo.oracle.naive import Hook, after, lora
from polygraft.launch.demo.oracle.plain import MODULES, Place, split
from tests.grafts.oracle.row import LINEAR, Row


def mixer(scale: float) -> Hook:
    """W x + s B M A x (MoSLoRA: Wu et al. 2024; LoRA-XS: Balazy et al. 2024, section 3)."""
    return after(lambda x, y, p: y + scale * (x @ p["A"].T @ p["M"].T) @ p["B"])


def _shifted(scale: float) -> Mapping[int, Hook]:
    """(W - s B0 A0) x + s B A x (Meng et al. 2024, eq. 2-5)."""
    return {0: lora(scale), 1: lora(-scale)}


def _part_frozen(part: str) -> Callable[[PeftModel, str, Tensor], Place]:
    """PEFT's LoRA without a gradient for one of its factors, as `create_lorafa_optimizer` and its MiCA leave it (which
    refuse float64; their starting values are in test_starts.py)."""

    def place(model: PeftModel, name: str, value: Tensor) -> Place:
        _, layer, site, found = split(name)
        module = model.get_submodule(f"base_model.model.model.layers.{layer}.{MODULES[site]}")
        weight = getattr(module, f"lora_{found}")["default"].weight.requires_grad_(found != part)
        return Place(weight, (lambda t: t.T) if found == "B" else (lambda t: t))

    return place


def gated(scale: float) -> Hook:
    """W x + s W_u (g * (W_d x)) (SoRA: Ding et al. 2023, section 3)."""
    return after(lambda x, y, p: y + scale * (p["keep"] * (x @ p["A"].T)) @ p["B"])


def nested(alpha: float, rank: int) -> Hook:
    """W x + (alpha / b) W_up[:, :b] W_down[:b] x (DyLoRA: Valipour et al. 2022)."""
    return after(lambda x, y, p: y + alpha / rank * (x @ p["A"][:rank].T) @ p["B"][:rank])


def triplets(scale: float) -> Hook:
    """W x + s P diag(E) Q x (Zhang et al. 2023, eq. 3)."""
    return after(lambda x, y, p: y + scale * (p["E"] * (x @ p["A"].T)) @ p["B"])


def adalora(model: PeftModel, name: str, value: Tensor) -> Place:
    _, layer, site, part = split(name)
    if part not in "AEB":
        return Place(torch.zeros_like(value))  # PEFT keeps what it smooths outside the model
    module = model.get_submodule(f"base_model.model.model.layers.{layer}.{MODULES[site]}")
    module.ranknum["default"].requires_grad_(False)  # a count; PEFT 0.21 leaves it trainable beside several layers
    views = {"A": lambda t: t, "E": lambda t: t.view(-1), "B": lambda t: t.T}
    return Place(getattr(module, f"lora_{part}")["default"], views[part])


ROWS: Mapping[str, Row] = {
    "pissa": Row("pissa(r=4, alpha=8)", hooks=lambda: _shifted(2.0)),
    "milora": Row("milora(r=4, alpha=2, at=attn.*)", hooks=lambda: _shifted(0.5)),
    "olora": Row("olora(r=4)@1", hooks=lambda: _shifted(2.0)),
    "eva": Row("eva(r=4, alpha=8)", lambda: LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR)),
    "corda": Row("corda(r=2, alpha=4, at=attn.v|ffn.down)", hooks=lambda: _shifted(2.0)),
    "lora-ga": Row("lora-ga(r=4, alpha=4)", hooks=lambda: _shifted(2.0)),
    "mica": Row(
        "mica(r=4, alpha=8)",
        lambda: LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR),
        place=_part_frozen("B"),
    ),
    "orthogonal": Row(
        "orthogonal(r=4, alpha=8)",
        lambda: LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, init_lora_weights="orthogonal"),
    ),
    "lora-fa": Row(
        "lora-fa(r=4, alpha=8)",
        lambda: LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR),
        place=_part_frozen("A"),
    ),
    "lora-plus": Row("lora-plus(r=4, alpha=8)", lambda: LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR)),
    "moslora": Row("moslora(r=4, alpha=8)", hooks=lambda: {0: mixer(2.0)}),
    "lora-xs": Row("lora-xs(r=4, alpha=8)", hooks=lambda: {0: mixer(2.0)}),
    "adalora": Row(
        "adalora(r=6, alpha=8, target=4)",
        lambda: AdaLoraConfig(init_r=6, target_r=4, lora_alpha=8, total_step=100, target_modules=LINEAR),
        place=adalora,
    ),
    "sora": Row("sora(r=4, alpha=8)", hooks=lambda: {0: gated(2.0)}),
    "dylora": Row("dylora(r=4, alpha=8)", lambda: LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR)),
    "qlora": Row("qlora(r=4, alpha=8, dropout=0)", lambda: LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR)),
    "loftq": Row("loftq(r=4, alpha=8)", lambda: LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR)),
    "elastic": Row(
        "lora(r=2, alpha=8) + elastic(sizes=1|2)", lambda: LoraConfig(r=2, lora_alpha=8, target_modules=LINEAR)
    ),
    "mezo": Row("lora(r=2, alpha=8) + mezo", lambda: LoraConfig(r=2, lora_alpha=8, target_modules=LINEAR)),
    "lora-dropout": Row("lora-dropout(r=4, alpha=8)", lambda: LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR)),
}
