"""LoRA with a small matrix between A and B.

- MoSLoRA (Wu et al. 2024, arXiv 2406.11909): y += s B M A x, M [r, r] trained with the others; it starts
  random, so that the ranks of A and B are mixed.
- LoRA-XS (Balazy et al. 2024, arXiv 2405.17604, section 3): y += s B M A x with B = U_r S_r and A = V_r^T of W's
  truncated SVD, frozen; M alone is trained and starts almost at 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.reparameterised.spectral import on_projections, weight_of
from polygraft.grafts.spec import Branch, DeclRef, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec


def moslora(r: int = 8, alpha: float = 16.0, at: str = "linear", dropout: float = 0.0) -> tuple[Slot, ...]:
    return (Branch(at=at, rank=r, scale=alpha / max(r, 1), dropout=dropout, form=DeclRef("moslora")),)


def lora_xs(r: int = 8, alpha: float = 16.0, at: str = "linear", dropout: float = 0.0) -> tuple[Slot, ...]:
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
