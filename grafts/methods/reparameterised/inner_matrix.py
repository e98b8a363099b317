"""LoRA with a small matrix between A and B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.ranges import Alpha, Dropout, Projections, Rank
from polygraft.grafts.methods.reparameterised.spectral import on_projections, weight_of
from polygraft.grafts.spec import Branch, DeclRef, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec


def moslora(r: Rank = 8, alpha: Alpha = 16.0, at: Projections = "linear", dropout: Dropout = 0.0) -> tuple[Slot, ...]:
    """LoRA with a trained mixer between its factors, y += s B M A x with M [r, r] random at the start, so that all
    ranks of A and B meet (Wu et al. 2024, arXiv 2406.11909, eq. 7).

    Deviations: M starts Kaiming-uniform; the paper also tries an orthogonal start.

    Choose when: LoRA is a little too little: r^2 numbers more, nothing when served, as M goes into A.
    """
    return (Branch(at=at, rank=r, scale=alpha / max(r, 1), dropout=dropout, form=DeclRef("moslora")),)


def lora_xs(r: Rank = 8, alpha: Alpha = 16.0, at: Projections = "linear", dropout: Dropout = 0.0) -> tuple[Slot, ...]:
    """y += s B M A x with B = U_r S_r and A = V_r^T of W's truncated SVD, frozen, and only M [r, r] trained (Balazy et
    al. 2024, arXiv 2405.17604, eq. 2 of its first version). M starts at N(0, 1e-5).

    Deviations: S_r stands with U_r, as that version prints it for y = W x; the authors' code has it with V_r^T, and so
    have they corrected the equation, to x W + x A R B.

    Choose when: grafts must be very small and independent of the model's width: r^2 numbers a site.
    """
    return (Branch(at=on_projections(at), rank=r, scale=alpha / max(r, 1), dropout=dropout, form=DeclRef("lora-xs")),)


def _mixer(slot: Branch, place: SiteShape) -> Mapping[str, TensorDecl]:
    return {
        "A": TensorDecl((slot.rank, place.d_in), "kaiming"),
        "M": TensorDecl((slot.rank, slot.rank), "kaiming"),
        "B": TensorDecl((slot.rank, place.d_out)),
    }


def _between(slot: Branch, place: SiteShape) -> Mapping[str, TensorDecl]:
    return {
        "A": TensorDecl((slot.rank, place.d_in), "truncated", trained=False),
        "M": TensorDecl((slot.rank, slot.rank), DeclRef("normal", (("std", 1e-5),))),
        "B": TensorDecl((slot.rank, place.d_out), "truncated", trained=False),
    }


def _operands(slot: Branch, values: Mapping[str, Tensor], lowering: Lowering) -> Mapping[str, Tensor]:
    return {"A": values["M"] @ values["A"], "B": values["B"]}


def _truncated(tensor: TensorSpec, making: Making) -> Tensor:
    from torch import linalg

    rank = tensor.shape[0]

    def make() -> tuple[Tensor, Tensor]:
        U, S, Vh = linalg.svd(weight_of(tensor, making), full_matrices=False)
        return Vh[:rank].clone(), S[:rank].unsqueeze(1) * U.T[:rank]

    return making.once(("truncated", tensor.site, rank), make)["AB".index(tensor.part)]


METHODS = (
    Method("moslora", "arXiv 2406.11909", 3e-4, moslora),
    Method("lora-xs", "arXiv 2405.17604", 4e-3, lora_xs),
)
PARAMETRIZATIONS = (Parametrization("moslora", _operands, _mixer), Parametrization("lora-xs", _operands, _between))
STARTS = (Start("truncated", _truncated),)
