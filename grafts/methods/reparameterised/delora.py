"""DeLoRA: directions and their strength apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Dropout, Projections, Rank
from polygraft.grafts.methods.reparameterised.spectral import on_projections
from polygraft.grafts.spec import Branch, DeclRef, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec

Parts = Mapping[str, TensorDecl]
Values = Mapping[str, "Tensor"]


def delora(r: Rank = 8, bound: float = 15.0, at: Projections = "linear", dropout: Dropout = 0.0) -> tuple[Slot, ...]:
    """dW = (l / r) sum_i b_i a_i^T / (|b_i| |a_i|): only directions in A and B, and the strength l apart, which bounds
    how far W can be moved (Bini et al. 2025, arXiv 2503.18225, eq. 8).

    `bound` is the start of l.

    Deviations: Column by column times the norms of W's columns, as in PEFT; the paper has one norm of W.

    Choose when: LoRA diverges or forgets: high learning rates are safe here.
    """
    return (Branch(at=on_projections(at), rank=r, dropout=dropout, form=DeclRef("delora", (("bound", bound),))),)


def _own(slot: Branch, place: SiteShape, bound: float) -> Parts:
    return {
        "A": TensorDecl((slot.rank, place.d_in), "kaiming"),
        "B": TensorDecl((slot.rank, place.d_out)),
        "l": TensorDecl((1,), DeclRef("full", (("value", bound),))),
        "w": TensorDecl((place.d_in,), "column-norm", trained=False),
    }


def _operands(slot: Branch, values: Values, lowering: Lowering, bound: float) -> Values:
    A, B = values["A"], values["B"]
    lengths = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=1).clamp(min=1e-4)  # B starts at 0
    strength = values["l"] / slot.rank / lengths
    return {"A": strength.unsqueeze(1) * A * values["w"], "B": B}


def _column_norm(tensor: TensorSpec, making: Making) -> Tensor:
    assert tensor.site is not None
    return making.weight(tensor.site).square().sum(0).sqrt()


METHODS = (Method("delora", "arXiv 2503.18225", 1e-3, delora),)
PARAMETRIZATIONS = (Parametrization("delora", _operands, _own),)
STARTS = (Start("column-norm", _column_norm),)
PEFT = (
    Peft(
        kind="DELORA",
        method="delora",
        names={"r": ("r", 8), "bound": ("delora_lambda", 15), "dropout": ("module_dropout", 0.0)},
        idle={"init_weights": True},
        patterns={"rank_pattern": "r", "lambda_pattern": "delora_lambda"},
        own={
            "A": Kept("delora_A"),
            "B": Kept("delora_B", turned=(0, 1)),
            "l": Kept("delora_lambda"),
            "w": Kept("delora_w_norm"),
        },
    ),
)
