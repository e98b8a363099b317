"""TinyLoRA: a few numbers between W's singular directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.exchange import Config, Kept, Peft
from polygraft.grafts.methods.ranges import Count, Dropout, Projections, Rank
from polygraft.grafts.methods.reparameterised.spectral import on_projections
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, TensorDecl]
Values = Mapping[str, "Tensor"]


def tinylora(
    r: Rank = 2, u: Count = 64, tied: int = 0, at: Projections = "linear", dropout: Dropout = 0.0
) -> tuple[Slot, ...]:
    """y += B (sum_i v_i P_i) A x, with A and B the r largest singular directions of W and P_i random, all frozen; only
    v [u] is trained, shared by all sites with `tied` (Morris et al. 2026, arXiv 2602.04118, section 4.0.2).

    Deviations: Held against PEFT; ties of groups of modules are left out, ours are of all sites or none.

    Choose when: a handful of numbers must do, as in reinforcement learning.
    """
    if tied not in (0, 1):
        raise SpecError(f"peft: tinylora.tied: {tied} is neither 0 nor 1")
    form = DeclRef("tinylora", (("u", u), ("tied", tied)))
    return (Branch(at=on_projections(at), rank=r, dropout=dropout, form=form),)


def _own(slot: Branch, place: SiteShape, u: int, tied: int) -> Parts:
    singular = DeclRef("singular", (("end", "major"),))
    return ({} if tied else {"v": TensorDecl((u,))}) | {
        "A": TensorDecl((slot.rank, place.d_in), singular, trained=False),
        "B": TensorDecl((slot.rank, place.d_out), singular, trained=False),
        "P": TensorDecl((u, slot.rank, slot.rank), DeclRef("normal", (("std", 1 / sqrt(slot.rank)),)), trained=False),
    }


def _shared(slot: Branch, places: Sequence[SiteShape], u: int, tied: int) -> Parts:
    return {"v": TensorDecl((u,))} if tied else {}


def _operands(slot: Branch, values: Values, lowering: Lowering, u: int, tied: int) -> Values:
    R = (values["v"] @ values["P"].flatten(1)).view(slot.rank, slot.rank)
    return {"A": R @ values["A"], "B": values["B"]}


METHODS = (Method("tinylora", "arXiv 2602.04118", 1e-3, tinylora),)
PARAMETRIZATIONS = (Parametrization("tinylora", _operands, _own, _shared),)


def _tied(config: Config) -> Config:
    tying = config.get("weight_tying") or 0
    if tying not in (0, 1):
        raise SpecError(f"weight_tying: {tying} ties groups of modules; here it is 0 or 1")
    return {"tied": int(tying == 1)}


PEFT = (
    Peft(
        kind="TINYLORA",
        method="tinylora",
        conv1d=True,
        names={"r": ("r", 2), "u": ("u", 64), "dropout": ("tinylora_dropout", 0.0)},
        fields=lambda tied, **_: {"weight_tying": float(tied)},
        arguments=_tied,
        reads=("weight_tying",),
        needs={"save_projection": True},
        idle={"init_weights": True, "init_v_bound": 0.02, "projection_seed": 42},
        own={
            "A": Kept("tinylora_A"),
            "B": Kept("tinylora_B", turned=(0, 1)),
            "P": Kept("tinylora_P"),
            "v": Kept("tinylora_v.{n}", of="model"),
        },
        shared={"v": Kept("tinylora_v.0")},
    ),
)
