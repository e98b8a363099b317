"""VeRA: LoRA's factors random, frozen and shared, and vectors trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Dropout, Projections, WideRank
from polygraft.grafts.spec import Branch, DeclRef, Slot

if TYPE_CHECKING:
    from torch import Tensor


def vera(r: WideRank = 256, d: float = 0.1, at: Projections = "attn.[qv]", dropout: Dropout = 0.0) -> tuple[Slot, ...]:
    """y += diag(b) B diag(d) A x with A and B random, frozen and shared by all layers; only the vectors d and b are
    trained (Kopiczko et al. 2024, arXiv 2310.11454, eq. 2).

    `d` is the start of the vector beside the ranks; the one beside the outputs starts at 0.

    Deviations: The matrices are as wide as the widest site, of which a narrower one takes the first columns, as in
    PEFT.

    Choose when: grafts must be small and many: a few hundred numbers a site. Computing costs what LoRA of the same
    (large) rank costs.
    """
    return (Branch(at=at, rank=r, dropout=dropout, form=DeclRef("vera", (("d", d),))),)


def _own(slot: Branch, place: SiteShape, d: float) -> Mapping[str, TensorDecl]:
    return {"d": TensorDecl((slot.rank,), DeclRef("full", (("value", d),))), "b": TensorDecl((place.d_out,))}


def frozen_pair(slot: Branch, places: Sequence[SiteShape], read: int) -> Mapping[str, TensorDecl]:
    """One A, of `read` rows, and one B as wide as the widest site, of which a narrower one takes the first columns."""
    widest = max(place.d_in for place in places), max(place.d_out for place in places)
    return {
        "A": TensorDecl((read, widest[0]), "kaiming", trained=False),
        "B": TensorDecl((slot.rank, widest[1]), "kaiming", trained=False),
    }


def _shared(slot: Branch, places: Sequence[SiteShape], d: float) -> Mapping[str, TensorDecl]:
    return frozen_pair(slot, places, slot.rank)


def _operands(slot: Branch, values: Mapping[str, Tensor], lowering: Lowering, d: float) -> Mapping[str, Tensor]:
    place = lowering.place
    A, B = values["A"][:, : place.d_in], values["B"][:, : place.d_out]
    return {"A": values["d"].unsqueeze(1) * A, "B": B * values["b"]}


METHODS = (Method("vera", "arXiv 2310.11454", 3e-3, vera),)
PARAMETRIZATIONS = (Parametrization("vera", _operands, _own, _shared),)
PEFT = (
    Peft(
        kind="VERA",
        method="vera",
        conv1d=True,
        names={"r": ("r", 256), "d": ("d_initial", 0.1), "dropout": ("vera_dropout", 0.0)},
        needs={"save_projection": True},
        idle={"init_weights": True, "projection_prng_key": None},
        own={"d": Kept("vera_lambda_d"), "b": Kept("vera_lambda_b")},
        shared={"A": Kept("vera_A"), "B": Kept("vera_B", turned=(0, 1))},
    ),
)
