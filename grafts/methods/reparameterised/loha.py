"""LoHa: an elementwise product of two low-rank matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Alpha, Projections, Rank
from polygraft.grafts.spec import DeclRef, Delta, Slot

if TYPE_CHECKING:
    from torch import Tensor


def loha(r: Rank = 8, alpha: Alpha = 8.0, at: Projections = "linear") -> tuple[Slot, ...]:
    """dW = s (B1 A1) * (B2 A2), the elementwise product of two matrices of rank r, whose rank reaches r^2 (Hyeon-Woo et
    al. 2022, arXiv 2108.06098, proposition 1).

    Deviations: Without the dropouts of ranks and modules that PEFT offers.

    Choose when: diffusion folders (LyCORIS) are to be served, or LoRA's rank is the limit. Twice LoRA's numbers, and a
    dense dW in every step.
    """
    return (Delta(at=at, form=DeclRef("loha", (("r", r), ("scale", alpha / max(r, 1))))),)


def _own(slot: Delta, place: SiteShape, r: int, scale: float) -> Mapping[str, TensorDecl]:
    normal, small = DeclRef("normal", (("std", 1.0),)), DeclRef("normal", (("std", 0.1),))
    return {
        "B1": TensorDecl((place.d_out, r), small),
        "A1": TensorDecl((r, place.d_in), normal),
        "B2": TensorDecl((place.d_out, r)),
        "A2": TensorDecl((r, place.d_in), normal),
    }


def _operands(
    slot: Delta, values: Mapping[str, Tensor], lowering: Lowering, r: int, scale: float
) -> Mapping[str, Tensor]:
    return {"W": scale * (values["B1"] @ values["A1"]) * (values["B2"] @ values["A2"])}


METHODS = (Method("loha", "arXiv 2108.06098", 3e-4, loha),)
PARAMETRIZATIONS = (Parametrization("loha", _operands, _own),)
PEFT = (
    Peft(
        kind="LOHA",
        method="loha",
        separable=True,
        biases=False,
        names={"r": ("r", 8), "alpha": ("alpha", 8)},
        idle={"init_weights": True, "rank_dropout": None, "module_dropout": None},
        patterns={"rank_pattern": "r", "alpha_pattern": "alpha"},
        own={
            "B1": Kept("hada_w1_a", rows=True),
            "A1": Kept("hada_w1_b"),
            "B2": Kept("hada_w2_a", rows=True),
            "A2": Kept("hada_w2_b"),
        },
    ),
)
