"""DoRA: a LoRA and the norms of W's rows."""

from math import sqrt

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.exchange import Config, Kept, Peft
from polygraft.grafts.methods.ranges import Alpha, Dropout, Projections, Rank
from polygraft.grafts.methods.reparameterised.lora import (
    LORA_HARMLESS,
    LORA_IDLE,
    LORA_KEPT,
    LORA_NAMES,
    LORA_PATTERNS,
    lora,
)
from polygraft.grafts.spec import Norm, Slot, SpecError


def dora(r: Rank = 8, alpha: Alpha = 16.0, at: Projections = "linear", dropout: Dropout = 0.0) -> tuple[Slot, ...]:
    """W' = m (W + B A) / ||W + B A||_row: LoRA for the direction of each row of W and a trained vector m for its
    length, the norm outside the gradient (Liu et al. 2024, arXiv 2402.09353, eq. 5 and 11).

    Deviations: None known. The paper speaks of columns of W [in, out]; they are the rows of ours.

    Choose when: LoRA falls short at small ranks. In training it costs a norm a step and site; served its norm is a
    scale.
    """
    return (*lora(r, alpha, at, dropout), Norm(at=at))


METHODS = (Method("dora", "arXiv 2402.09353", 3e-4, dora),)


def _stable(config: Config) -> Config:
    """alpha / sqrt(r) is this over r."""
    rank, alpha = config.get("r") or 8, config.get("lora_alpha") or 8
    if not (isinstance(rank, int) and isinstance(alpha, int | float)):
        raise SpecError(f"r, lora_alpha: {rank!r} and {alpha!r} are not numbers")
    return {"alpha": alpha * sqrt(max(rank, 1))}


_KEPT = LORA_KEPT | {"m": Kept("lora_magnitude_vector", rows=True)}
PEFT = (
    Peft(
        kind="LORA",
        method="dora",
        conv1d=True,
        separable=True,
        names=LORA_NAMES | {"alpha": ("lora_alpha", 8)},
        fixed={"use_dora": True, "use_rslora": False},
        idle=LORA_IDLE,
        harmless=LORA_HARMLESS,
        patterns=LORA_PATTERNS,
        own=_KEPT,
    ),
    Peft(
        kind="LORA",
        method="dora",
        conv1d=True,
        separable=True,
        names=LORA_NAMES,
        arguments=_stable,
        reads=("lora_alpha",),
        fixed={"use_dora": True, "use_rslora": True},
        idle=LORA_IDLE,
        harmless=LORA_HARMLESS,
        patterns=LORA_PATTERNS,
        own=_KEPT,
    ),
)
