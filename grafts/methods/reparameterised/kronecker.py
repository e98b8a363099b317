"""dW made of Kronecker products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Alpha, Projections, Rank, Scale
from polygraft.grafts.spec import DeclRef, Delta, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, TensorDecl]
Values = Mapping[str, "Tensor"]


def lokr(
    r: Rank = 8, alpha: Alpha = 8.0, at: Projections = "linear", factor: int = -1, both: int = 0
) -> tuple[Slot, ...]:
    """dW = (alpha / r) C (x) (B A), a Kronecker product of a small full matrix and one of low rank (Yeh et al. 2024,
    arXiv 2309.14859, eq. 4 and 5).

    `factor` is the wished size of C, -1 for as square as possible; with `both`, C is made low-rank too.

    Deviations: Each factor is low-rank only where that makes it smaller, as in PEFT; without the dropouts of ranks and
    modules.

    Choose when: diffusion folders (LyCORIS) are to be served, or full rank is wanted from few numbers. A dense dW is
    made in every step.
    """
    arguments = (("r", r), ("scale", alpha / max(r, 1)), ("factor", factor), ("both", both))
    return (Delta(at=at, form=DeclRef("lokr", arguments)),)


def krona(scale: Scale = 1.0, at: Projections = "linear", factor: int = -1) -> tuple[Slot, ...]:
    """dW = s A (x) B with two full factors (Edalati et al. 2022, arXiv 2212.10650).

    `factor` is the wished size of A, -1 for as square as possible.

    Deviations: The variant beside a projection alone; the paper's residual one (KronA-B res) is left out.

    Choose when: full rank from few numbers is wanted without a choice of rank.
    """
    return (Delta(at=at, form=DeclRef("krona", (("scale", scale), ("factor", factor)))),)


def kadaptation(n: int = 4, at: Projections = "linear") -> tuple[Slot, ...]:
    """dW = sum_i S_i (x) (s_i t_i^T), with the slow weights S_i shared by all sites (He et al. 2022, arXiv 2203.16329).

    `n` slow weights of n x n numbers.

    Deviations: At all projections by default, where the paper has attention of a vision transformer.

    Choose when: `compacter`'s economy is wanted and the graft must merge.
    """
    return (Delta(at=at, form=DeclRef("kadaptation", (("n", n),))),)


def factors(width: int, wished: int) -> tuple[int, int]:
    """Two numbers whose product is `width`: the wished one first if it divides, else the divisor nearest below it and
    the square root."""
    if wished > 0 and width % wished == 0:
        return wished, width // wished
    below = min(isqrt(width), wished if wished > 0 else width)
    first = next(m for m in range(below, 0, -1) if width % m == 0)
    return first, width // first


def divided(place: SiteShape, n: int) -> tuple[int, int]:
    """Widths of the input and output over n; raises SpecError where there is a rest."""
    for width in (place.d_in, place.d_out):
        if n < 1 or width % n:
            raise SpecError(f"n: {n} does not divide the width {width} of {place.name}; give a common divisor")
    return place.d_in // n, place.d_out // n


def _lokr_own(slot: Delta, place: SiteShape, r: int, scale: float, factor: int, both: int) -> Parts:
    (in_1, in_2), (out_1, out_2) = factors(place.d_in, factor), factors(place.d_out, factor)
    if both and r < max(out_1, in_1) / 2:
        first = {"C1": TensorDecl((out_1, r)), "C2": TensorDecl((r, in_1), "kaiming")}
    else:
        first = {"C": TensorDecl((out_1, in_1))}
    if r < max(out_2, in_2) / 2:
        return first | {"B": TensorDecl((out_2, r), "kaiming"), "A": TensorDecl((r, in_2), "kaiming")}
    return first | {"BA": TensorDecl((out_2, in_2), "kaiming")}


def _lokr(  # noqa: PLR0913
    slot: Delta, values: Values, lowering: Lowering, r: int, scale: float, factor: int, both: int
) -> Mapping[str, Tensor]:
    from torch import kron

    C = values["C"] if "C" in values else values["C1"] @ values["C2"]
    BA = values["BA"] if "BA" in values else values["B"] @ values["A"]
    return {"W": scale * kron(C, BA)}


def _krona_own(slot: Delta, place: SiteShape, scale: float, factor: int) -> Parts:
    (in_1, in_2), (out_1, out_2) = factors(place.d_in, factor), factors(place.d_out, factor)
    return {"A": TensorDecl((out_1, in_1), "kaiming"), "B": TensorDecl((out_2, in_2))}


def _krona(slot: Delta, values: Values, lowering: Lowering, scale: float, factor: int) -> Mapping[str, Tensor]:
    from torch import kron

    return {"W": scale * kron(values["A"], values["B"])}


def _kadaptation_own(slot: Delta, place: SiteShape, n: int) -> Parts:
    d_in, d_out = divided(place, n)
    return {"s": TensorDecl((n, d_out)), "t": TensorDecl((n, d_in), "normal")}


def _kadaptation_shared(slot: Delta, places: Sequence[SiteShape], n: int) -> Parts:
    return {"S": TensorDecl((n, n, n), DeclRef("normal", (("std", 1.0),)))}


def _kadaptation(slot: Delta, values: Values, lowering: Lowering, n: int) -> Mapping[str, Tensor]:
    return {"W": kronecker_sum(values["S"], values["s"].unsqueeze(2) * values["t"].unsqueeze(1))}


def kronecker_sum(S: Tensor, T: Tensor) -> Tensor:
    """sum_i S_i (x) T_i, [a c, b d] of S [n, a, b] and T [n, c, d]."""
    (n, a, b), (_, c, d) = S.shape, T.shape
    return (S.reshape(n, a * b).T @ T.reshape(n, c * d)).view(a, b, c, d).transpose(1, 2).reshape(a * c, b * d)


METHODS = (
    Method("lokr", "arXiv 2309.14859", 3e-3, lokr),
    Method("krona", "arXiv 2212.10650", 1e-3, krona),
    Method("kadaptation", "arXiv 2203.16329", 1e-3, kadaptation),
)
PARAMETRIZATIONS = (
    Parametrization("lokr", _lokr, _lokr_own),
    Parametrization("krona", _krona, _krona_own),
    Parametrization("kadaptation", _kadaptation, _kadaptation_own, _kadaptation_shared),
)
PEFT = (
    Peft(
        kind="LOKR",
        method="lokr",
        biases=False,
        names={"r": ("r", 8), "alpha": ("alpha", 8), "factor": ("decompose_factor", -1)},
        fields=lambda both, **_: {"decompose_both": bool(both)},
        arguments=lambda config: {"both": int(bool(config.get("decompose_both")))},
        reads=("decompose_both",),
        idle={"init_weights": True, "rank_dropout": None, "module_dropout": None, "rank_dropout_scale": None},
        patterns={"rank_pattern": "r", "alpha_pattern": "alpha"},
        own={
            "C": Kept("lokr_w1"),
            "C1": Kept("lokr_w1_a"),
            "C2": Kept("lokr_w1_b"),
            "BA": Kept("lokr_w2"),
            "B": Kept("lokr_w2_a"),
            "A": Kept("lokr_w2_b"),
        },
    ),
)
