"""Bi-Adapter: an adapter of two values a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.additive.adapters import act_of
from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.ranges import Scale, Sublayers, Width
from polygraft.grafts.spec import Branch, DeclRef, Slot

if TYPE_CHECKING:
    from torch import Tensor


Parts = Mapping[str, TensorDecl]
Values = Mapping[str, "Tensor"]
HALF = 0.6744897501960817  # P(|x| < HALF) = 1/2 for a standard normal x


def binary_adapter(
    size: Width = 32, scale: Scale = 1.0, act: str = "gelu", at: Sublayers = "ffn.out"
) -> tuple[Slot, ...]:
    """Bi-Adapter: a parallel adapter whose weights are computed with as mean +- 0.674 deviations, the two medians of a
    normal distribution's halves; rounding passes gradients on (Jie et al. 2023, arXiv 2307.16867, section 3).

    Deviations: B does not start at 0, where its deviation would be 0. The graft is kept with its full weights, so that
    it can be trained on.

    Choose when: an adapter's size counts above all: a bit a weight when it is stored by others.
    """
    return (Branch(at=at, rank=size, scale=scale, act=act_of(act), form=DeclRef("binary")),)


def _binary_own(slot: Branch, place: SiteShape) -> Parts:
    """B does not start at 0, where its deviation would be 0 and so would be its gradient's share in it."""
    return {
        "A": TensorDecl((slot.rank, place.d_in), "kaiming"),
        "B": TensorDecl((slot.rank, place.d_out), DeclRef("normal", (("std", 1e-3),))),
    }


def _binary(slot: Branch, values: Values, lowering: Lowering) -> Values:
    return {part: _two_valued(values[part]) for part in "AB"}


def _two_valued(w: Tensor) -> Tensor:
    mean, deviation = w.mean(), w.std()
    z = (w - mean) / (deviation + 1e-5)
    rounded = HALF * z.detach().sign() + (z - z.detach())
    return rounded * deviation + mean


METHODS = (Method("binary-adapter", "arXiv 2307.16867", 1e-3, binary_adapter, aliases=("bi-adapter",)),)
PARAMETRIZATIONS = (Parametrization("binary", _binary, _binary_own),)
