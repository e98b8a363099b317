"""LoRA, and LoRA with a rank-stabilised scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Alpha, Dropout, Projections, Rank
from polygraft.grafts.spec import Branch, Slot

if TYPE_CHECKING:
    from torch import Tensor


def lora(r: Rank = 8, alpha: Alpha = 16.0, at: Projections = "linear", dropout: Dropout = 0.0) -> tuple[Slot, ...]:
    """y += (alpha / r) B A x beside a projection, with A [r, in] random and B [out, r] zero at the start (Hu et al.
    2021, arXiv 2106.09685, eq. 3).

    Deviations: By default at all projections, where the paper has queries and values; dropout is on x, as in the
    authors' code.

    Choose when: nothing speaks for another: it merges, is read by every server, and with a tuned learning rate its many
    descendants are mostly within one or two points of it.
    """
    return (Branch(at=at, rank=r, scale=alpha / max(r, 1), dropout=dropout),)


def rslora(r: Rank = 8, alpha: Alpha = 16.0, at: Projections = "linear", dropout: Dropout = 0.0) -> tuple[Slot, ...]:
    """LoRA with the rank-stabilised scale alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2).

    Deviations: None known.

    Choose when: the rank is high (64 and more): with alpha / r the update shrinks as r grows. At small ranks it is LoRA
    with a larger alpha.
    """
    return (Branch(at=at, rank=r, scale=alpha / sqrt(max(r, 1)), dropout=dropout),)


METHODS = (
    Method("lora", "arXiv 2106.09685", 3e-4, lora),
    Method("rslora", "arXiv 2312.03732", 3e-4, rslora),
)

# PEFT's fields of all LoRAs; its other starting values change W, which a folder does not say.
LORA_NAMES: dict[str, tuple[str, object]] = {"r": ("r", 8), "dropout": ("lora_dropout", 0.0)}
LORA_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
LORA_IDLE = {"init_lora_weights": True, "eva_config": None}
LORA_HARMLESS = {"init_lora_weights": ("gaussian", "eva", "mica", "orthogonal")}
LORA_KEPT = {"A": Kept("lora_A.weight"), "B": Kept("lora_B.weight", turned=(0, 1), rows=True)}


def _shift(
    stored: Mapping[str, Tensor], module: str, slot: Branch, number: Callable[[str], Tensor | None]
) -> tuple[Tensor, set[str]] | None:
    """With `lora_bias` B has a bias c: y += s (B A x + c)."""
    key = f"{module}.lora_B.bias"
    return (slot.scale * stored[key].double(), {key}) if key in stored else None


PEFT = tuple(
    Peft(
        kind="LORA",
        method=method,
        conv1d=True,
        separable=True,
        shift=_shift,
        names=LORA_NAMES | {"alpha": ("lora_alpha", 8)},
        fixed={"use_dora": False, "use_rslora": method == "rslora"},
        idle=LORA_IDLE | {"lora_bias": False},
        harmless=LORA_HARMLESS,
        patterns=LORA_PATTERNS,
        own=LORA_KEPT,
    )
    for method in ("lora", "rslora")
)
