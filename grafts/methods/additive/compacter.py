"""Serial adapters whose two matrices are sums of Kronecker products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from polygraft.grafts.methods.additive.adapters import act_of
from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.ranges import Sublayers, Width
from polygraft.grafts.methods.reparameterised.kronecker import divided, kronecker_sum
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, TensorDecl]
Values = Mapping[str, "Tensor"]


def compacter(size: Width = 24, n: int = 4, act: str = "gelu", at: Sublayers = "attn.out|ffn.out") -> tuple[Slot, ...]:
    """Serial adapters whose two matrices are sums of Kronecker products, sum_i S_i (x) (s_i t_i^T), with the small S
    [n, n, n] shared by all sites and both matrices (Karimi Mahabadi et al. 2021, arXiv 2106.04647, eq. 5).

    At=ffn.out alone is the paper's Compacter++.

    Deviations: Without biases, and layer norms are not trained beside it.

    Choose when: a graft has to be tiny: an adapter of width d costs about d numbers a matrix. n must divide the widths
    and the size.
    """
    return _adapter("compacter", size, n, act, at)


def phm(size: Width = 24, n: int = 4, act: str = "gelu", at: Sublayers = "attn.out|ffn.out") -> tuple[Slot, ...]:
    """Serial adapters whose two matrices are sum_i S_i (x) T_i with full T_i [d / n, k / n] and the small S [n, n, n]
    shared by all sites: the PHM layer that Compacter starts from (Karimi Mahabadi et al. 2021, arXiv 2106.04647, eq.
    4).

    Deviations: Without biases, and layer norms are not trained beside it.

    Choose when: `compacter`, whose T_i have rank one, is too small for the task: this one has 1 / n of an adapter's
    numbers.
    """
    return _adapter("phm", size, n, act, at)


def _adapter(form: str, size: int, n: int, act: str, at: str) -> tuple[Slot, ...]:
    if n < 1 or size % n:
        raise SpecError(f"peft: {form}.n: {n} does not divide the size {size}; give a divisor")
    return (Branch(at=at, rank=size, act=act_of(act), tap="output", form=DeclRef(form, (("n", n),))),)


def _compacter_own(slot: Branch, place: SiteShape, n: int) -> Parts:
    (d_in, d_out), size = divided(place, n), slot.rank // n
    return {
        "down_s": TensorDecl((n, size), "normal"),
        "down_t": TensorDecl((n, d_in), "normal"),
        "up_s": TensorDecl((n, d_out)),
        "up_t": TensorDecl((n, size), "normal"),
    }


def _phm_own(slot: Branch, place: SiteShape, n: int) -> Parts:
    (d_in, d_out), size = divided(place, n), slot.rank // n
    return {"down": TensorDecl((n, size, d_in), "normal"), "up": TensorDecl((n, d_out, size))}


def _shared(slot: Branch, places: Sequence[SiteShape], n: int) -> Parts:
    return {"S": TensorDecl((n, n, n), DeclRef("normal", (("std", 1.0),)))}


def _compacter(slot: Branch, values: Values, lowering: Lowering, n: int) -> Values:
    down, up = (values[f"{side}_s"].unsqueeze(2) * values[f"{side}_t"].unsqueeze(1) for side in ("down", "up"))
    return {"A": kronecker_sum(values["S"], down), "B": kronecker_sum(values["S"], up).T}


def _phm(slot: Branch, values: Values, lowering: Lowering, n: int) -> Values:
    return {"A": kronecker_sum(values["S"], values["down"]), "B": kronecker_sum(values["S"], values["up"]).T}


METHODS = (
    Method("compacter", "arXiv 2106.04647", 3e-3, compacter),
    Method("phm", "arXiv 2106.04647", 1e-3, phm),
)
PARAMETRIZATIONS = (
    Parametrization("compacter", _compacter, _compacter_own, _shared),
    Parametrization("phm", _phm, _phm_own, _shared),
)
