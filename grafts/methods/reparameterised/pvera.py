"""PVeRA: a VeRA whose middle is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Projections, WideRank
from polygraft.grafts.methods.reparameterised.vera import frozen_pair
from polygraft.grafts.spec import Branch, DeclRef, Slot

if TYPE_CHECKING:
    from torch import Tensor


def pvera(r: WideRank = 256, d: float = 0.1, at: Projections = "attn.[qv]") -> tuple[Slot, ...]:
    """VeRA with a distribution in its middle: y += diag(b) B h with h ~ N(m, diag(exp(v))) and [m; v] = diag(d) A x, A
    and B frozen and shared by all layers (arXiv 2512.07703, as PEFT 0.21 has it).

    `d` is the start of the vector beside the ranks; the one beside the outputs starts at 0.

    Deviations: Held against PEFT: in training every row draws its own h, without a penalty on the distribution; served
    and evaluated is the mean, which is a VeRA.

    Choose when: VeRA overfits: the noise regularises.
    """
    return (Branch(at=at, rank=r, gate="noise", form=DeclRef("pvera", (("d", d),))),)


def _own(slot: Branch, place: SiteShape, d: float) -> Mapping[str, TensorDecl]:
    return {"d": TensorDecl((2 * slot.rank,), DeclRef("full", (("value", d),))), "b": TensorDecl((place.d_out,))}


def _shared(slot: Branch, places: Sequence[SiteShape], d: float) -> Mapping[str, TensorDecl]:
    return frozen_pair(slot, places, 2 * slot.rank)


def _operands(slot: Branch, values: Mapping[str, Tensor], lowering: Lowering, d: float) -> Mapping[str, Tensor]:
    place = lowering.place
    A, G = (values["d"].unsqueeze(1) * values["A"][:, : place.d_in]).chunk(2)
    return {"A": A, "B": values["B"][:, : place.d_out] * values["b"], "G": G}


METHODS = (Method("pvera", "arXiv 2512.07703", 3e-3, pvera),)
PARAMETRIZATIONS = (Parametrization("pvera", _operands, _own, _shared),)
PEFT = (
    Peft(
        kind="PVERA",
        method="pvera",
        conv1d=True,
        names={"r": ("r", 256), "d": ("d_initial", 0.1)},
        needs={"save_projection": True, "sample_at_inference": False},
        idle={"init_weights": True, "projection_prng_key": None, "pvera_dropout": None, "generator_seed": None},
        own={"d": Kept("pvera_lambda_d"), "b": Kept("pvera_lambda_b")},
        shared={"A": Kept("pvera_A"), "B": Kept("pvera_B", turned=(0, 1))},
    ),
)
