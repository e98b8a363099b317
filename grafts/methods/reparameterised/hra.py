"""HRA: trained Householder reflections of W's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.exchange import Config, Kept, Peft
from polygraft.grafts.methods.ranges import Projections, Rank
from polygraft.grafts.spec import DeclRef, Rotate, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec


def hra(r: Rank = 8, at: Projections = "linear", start: str = "pairs") -> tuple[Slot, ...]:
    """W' = W H_1 ... H_r with trained Householder reflections H_k = 1 - 2 u_k u_k^T / |u_k|^2 (Yuan et al. 2024, arXiv
    2405.17484, eq. 1).

    The u come in equal `pairs` at the start, whose reflections cancel: r is even. With `start` random each is drawn
    alone, and training starts from a turned W, as PEFT's does where r is odd.

    Deviations: Without the regulariser that keeps the u orthogonal to one another (eq. 6).

    Choose when: orthogonal finetuning is wanted at LoRA's cost: its product is one of rank r.
    """
    if start not in ("pairs", "random"):
        raise SpecError(f"peft: hra.start: {start!r} is unknown; choices: pairs, random")
    if r % 2 and start == "pairs":
        raise SpecError(f"r: {r} reflections do not start as the identity; give an even number")
    form = DeclRef("hra") if start == "pairs" else DeclRef("hra", (("start", start),))
    return (Rotate(at=at, kind="lowrank", size=r, form=form),)


def _own(slot: Rotate, place: SiteShape, start: str = "pairs") -> Mapping[str, TensorDecl]:
    return {
        "u": TensorDecl((slot.size, place.d_in), DeclRef("hra-vectors", (("each", 1 if start == "random" else 2),)))
    }


def _operands(
    slot: Rotate, values: Mapping[str, Tensor], lowering: Lowering, start: str = "pairs"
) -> Mapping[str, Tensor]:
    """x H_r ... H_1 = x - (x U^T) L^-1 U with U the unit vectors and L the lower triangle of U U^T, 1/2 on its diagonal
    (the compact form of a product of reflections, Joffrain et al. 2006)."""
    import torch

    U = values["u"] / values["u"].norm(dim=1, keepdim=True)
    L = (U @ U.T).tril(-1) + 0.5 * torch.eye(len(U), dtype=U.dtype, device=U.device)
    return {"A": U, "B": -torch.linalg.solve_triangular(L, U, upper=False)}


def _vectors(tensor: TensorSpec, making: Making, each: int) -> Tensor:
    """Kaiming-uniform as in PEFT, of every vector `each` equal ones in a row."""
    import torch

    count = tensor.shape[0] // each
    bound = count**-0.5
    drawn = torch.rand(count, tensor.shape[1], generator=making.generator(tensor.name)) * (2 * bound) - bound
    found: Tensor = drawn.repeat_interleave(each, dim=0)
    return found


def _arguments(config: Config) -> Config:
    r = config.get("r", 8)
    odd = isinstance(r, int) and r % 2 == 1
    return {"start": "random" if odd or config.get("init_weights", True) is False else "pairs"}


METHODS = (Method("hra", "arXiv 2405.17484", 1e-4, hra),)
PARAMETRIZATIONS = (Parametrization("hra", _operands, _own),)
STARTS = (Start("hra-vectors", _vectors),)
PEFT = (
    Peft(
        kind="HRA",
        method="hra",
        separable=True,
        names={"r": ("r", 8)},
        fields=lambda start, **_: {} if start == "pairs" else {"init_weights": False},
        arguments=_arguments,
        reads=("init_weights",),
        own={"u": Kept("hra_u", turned=(0, 1))},
    ),
)
