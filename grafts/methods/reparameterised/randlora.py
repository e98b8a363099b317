"""RandLoRA: a sum of random bases with trained diagonals. A lies on the narrower side of W, so that a site has r n + n
min(in, out) numbers for its n = ceil(min(in, out) / r) bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Projections, Rank
from polygraft.grafts.spec import DeclRef, Delta, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec


def randlora(r: Rank = 32, alpha: float = 640.0, at: Projections = "linear") -> tuple[Slot, ...]:
    """dW = (alpha / r) sum_i B_i diag(l_i) A diag(g_i) of full rank, with random bases A and B_i frozen and shared by
    all sites, and only the diagonals trained (Albert et al. 2025, arXiv 2502.00987, eq. 4).

    Deviations: Which column of B meets which row of A is as in PEFT, whose files must mean the same; its sparse bases
    are left out.

    Choose when: full rank is wanted at LoRA's number of parameters. A dense dW is made in every step.
    """
    return (Delta(at=at, form=DeclRef("randlora", (("r", r), ("scale", alpha / max(r, 1))))),)


def _own(slot: Delta, place: SiteShape, r: int, scale: float) -> Mapping[str, TensorDecl]:
    narrow = min(place.d_in, place.d_out)
    bases = _bases(narrow, r)
    return {
        "l": TensorDecl((r, bases)),
        "g": TensorDecl((bases, narrow), DeclRef("full", (("value", 1 / max(narrow, bases)),))),
    }


def _shared(slot: Delta, places: Sequence[SiteShape], r: int, scale: float) -> Mapping[str, TensorDecl]:
    """As large as the widest input and output need, as in PEFT; a site takes the first bases, rows and columns."""
    widths = max(place.d_in for place in places), max(place.d_out for place in places)
    return {
        "A": TensorDecl((r, 1, min(widths)), "unit-variance", trained=False),
        "B": TensorDecl((max(widths), _bases(min(widths), r), r), "unit-variance", trained=False),
    }


def _operands(
    slot: Delta, values: Mapping[str, Tensor], lowering: Lowering, r: int, scale: float
) -> Mapping[str, Tensor]:
    place, g = lowering.place, values["g"]
    bases, narrow = g.shape
    A = values["l"].unsqueeze(2) * values["A"][:, :, :narrow] * g  # [r, bases, narrow]
    B = values["B"][: max(place.d_in, place.d_out), :bases]
    # Which column of B meets which row of A is as in PEFT, whose files must mean the same: B counts the ranks of a base
    # after one another, A the bases of a rank.
    W = scale * (B.flatten(1) @ A.flatten(0, 1))
    return {"W": W if place.d_in <= place.d_out else W.T}


def _bases(narrow: int, r: int) -> int:
    return -(-narrow // max(r, 1))


def _unit_variance(tensor: TensorSpec, making: Making) -> Tensor:
    """Uniform, with a standard deviation of just one over its elements."""
    import torch

    value = torch.rand(tensor.shape, generator=making.generator(tensor.name)) * 2 - 1
    return value / value.std()


METHODS = (Method("randlora", "arXiv 2502.00987", 1e-4, randlora),)
PARAMETRIZATIONS = (Parametrization("randlora", _operands, _own, _shared),)
STARTS = (Start("unit-variance", _unit_variance),)
PEFT = (
    Peft(
        kind="RANDLORA",
        method="randlora",
        conv1d=True,
        names={"r": ("r", 32), "alpha": ("randlora_alpha", 640)},
        needs={"save_projection": True},
        idle={
            "init_weights": True,
            "projection_prng_key": None,
            "randlora_dropout": None,
            "sparse": None,
            "very_sparse": None,
        },
        own={"l": Kept("randlora_lambda"), "g": Kept("randlora_gamma")},
        shared={"A": Kept("randlora_A"), "B": Kept("randlora_B")},
    ),
)
