"""Polytropon and multi-head routing: a LoRA that is a mixture of skills."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Projections, Rank
from polygraft.grafts.methods.selective.support import uniform
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec

_EPS, _SPREAD = 1e-12, 1e-3  # PEFT's own


def poly(r: Rank = 8, skills: int = 4, splits: int = 1, at: Projections = "linear") -> tuple[Slot, ...]:
    """Polytropon: y += (1 / r) B A x of a mixture of skills, A = sum_s w_s A_s and B = sum_s w_s B_s with w =
    sigmoid(z) / sum sigmoid(z) (Ponti et al. 2023, arXiv 2202.13914, eq. 2 to 4 of EACL's version); with splits the
    inputs and outputs are cut into as many blocks, each with weights of its own (MHR: Caccia et al. 2023, arXiv
    2211.03831).

    `skills` are the LoRAs that each projection mixes, `splits` the blocks that mix them in their own way.

    Deviations: As in PEFT A and B are mixed each for itself, where the paper mixes the products A_s B_s, and z learns
    at the rate of all else. A graft is of one task, so the matrix of tasks and skills has one row. In training
    sigmoid(z) is a draw of the relaxed Bernoulli distribution at a temperature of 1, here one a step and projection,
    in PEFT one a sequence.

    Choose when: you bring PEFT's Poly folders of one task; several tasks, for which it was made, are several jobs here.
    """
    for name, count in (("skills", skills), ("splits", splits)):
        if count < 1:
            raise SpecError(f"peft: poly.{name}: {count} is not a number of them; give at least 1")
    form = DeclRef("poly", (("skills", skills), ("splits", splits)))
    return (Branch(at=at, rank=r, scale=1 / max(r, 1), form=form),)


def _own(slot: Branch, place: SiteShape, skills: int, splits: int) -> Mapping[str, TensorDecl]:
    if place.d_in % splits or place.d_out % splits:
        raise SpecError(f"peft: poly.splits: {splits} does not divide {place.d_in} inputs and {place.d_out} outputs")
    return {
        "A": TensorDecl((splits, place.d_in // splits, skills, slot.rank), "kaiming"),
        "B": TensorDecl((splits, skills, slot.rank, place.d_out // splits)),
        "logits": TensorDecl((1, splits * skills), "near-zero"),
    }


def _operands(
    slot: Branch, values: Mapping[str, Tensor], lowering: Lowering, skills: int, splits: int
) -> Mapping[str, Tensor]:
    import torch

    z = values["logits"]
    if lowering.draw is not None:
        z = z + torch.logit(uniform(lowering.draw, lowering.place, z), eps=1e-6)
    opened = z.sigmoid().view(splits, skills)
    weights = opened / (opened.sum(1, keepdim=True) + _EPS)
    A = torch.einsum("qs,qdsr->rqd", weights, values["A"])
    B = torch.einsum("qs,qsrd->rqd", weights, values["B"])
    return {"A": A.flatten(1), "B": B.flatten(1)}


def _near_zero(tensor: TensorSpec, making: Making) -> Tensor:
    import torch

    return (2 * torch.rand(tensor.shape, generator=making.generator(tensor.name)) - 1) * _SPREAD


METHODS = (Method("poly", "arXiv 2202.13914", 3e-4, poly, aliases=("polytropon",)),)
PARAMETRIZATIONS = (Parametrization("poly", _operands, _own),)
STARTS = (Start("near-zero", _near_zero),)
PEFT = (
    Peft(
        kind="POLY",
        method="poly",
        biases=False,
        names={"r": ("r", 8), "skills": ("n_skills", 4), "splits": ("n_splits", 1)},
        needs={"n_tasks": 1, "poly_type": "poly"},
        idle={"init_weights": True},
        layered=False,
        own={
            "A": Kept("poly_lora_A", turned=(1, 2)),
            "B": Kept("poly_lora_B"),
            "logits": Kept("poly_router.module_logits"),
        },
    ),
)
