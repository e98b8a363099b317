"""HRA: trained Householder reflections of W's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.spec import DeclRef, Rotate, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec


def hra(r: int = 8, at: str = "linear") -> tuple[Slot, ...]:
    """W' = W H_1 ... H_r with trained Householder reflections H_k = 1 - 2 u_k u_k^T / |u_k|^2 (Yuan et al. 2024, arXiv
    2405.17484, eq. 1).

    The u come in equal pairs at the start, whose reflections cancel: r is even.

    Deviations: Without the regulariser that keeps the u orthogonal to one another (eq. 6).

    Choose when: orthogonal finetuning is wanted at LoRA's cost: its product is one of rank r.
    """
    if r % 2:
        raise SpecError(f"r: {r} reflections do not start as the identity; give an even number")
    return (Rotate(at=at, kind="lowrank", size=r, form=DeclRef("hra")),)


def _own(slot: Rotate, place: SiteShape) -> Mapping[str, TensorDecl]:
    return {"u": TensorDecl((slot.size, place.d_in), "hra_pairs")}


def _operands(slot: Rotate, values: Mapping[str, Tensor], lowering: Lowering) -> Mapping[str, Tensor]:
    """x H_r ... H_1 = x - (x U^T) L^-1 U with U the unit vectors and L the lower triangle of U U^T, 1/2 on its diagonal
    (the compact form of a product of reflections, Joffrain et al. 2006)."""
    import torch

    U = values["u"] / values["u"].norm(dim=1, keepdim=True)
    L = (U @ U.T).tril(-1) + 0.5 * torch.eye(len(U), dtype=U.dtype, device=U.device)
    return {"A": U, "B": -torch.linalg.solve_triangular(L, U, upper=False)}


def _pairs(tensor: TensorSpec, making: Making) -> Tensor:
    """Kaiming-uniform as in PEFT, every vector twice."""
    import torch

    half = tensor.shape[0] // 2
    bound = half**-0.5
    drawn = torch.rand(half, tensor.shape[1], generator=making.generator(tensor.name)) * (2 * bound) - bound
    pairs: Tensor = drawn.repeat_interleave(2, dim=0)
    return pairs


METHODS = (Method("hra", "arXiv 2405.17484", 1e-4, hra),)
PARAMETRIZATIONS = (Parametrization("hra", _operands, _own),)
STARTS = (Start("hra_pairs", _pairs),)
PEFT = (
    Peft(
        kind="HRA",
        method="hra",
        names={"r": ("r", 8)},
        idle={"init_weights": True},
        own={"u": Kept("hra_u", turned=(0, 1))},
    ),
)
