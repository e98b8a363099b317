"""Branches that are added to products step by step, and their gradients, as the row-invariance contract asks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from polygraft.grafts.runtime.linears.protocol import FrozenLinear, Kept
from polygraft.kernels.branch.op import add_branch_, branch_gradients
from polygraft.kernels.dense.op import Work


def add_branches_(outputs: Sequence[Tensor], x_TI: Tensor, work: Work) -> Kept:
    """Every branch added to its projection's product in place, and what its gradients need."""
    return [add_branch_(outputs[b.member], x_TI, b.A, b.B, segments, b.act) for b, segments in work]


def backward(
    linear: FrozenLinear, dy_TO: Tensor, x_TI: Tensor | None, work: Work, kept: Kept
) -> tuple[Tensor, list[Tensor | None]]:
    """`FrozenLinear.backward` after `add_branches_`."""
    # Each member's columns of dy, however they came: a product's order of sums may depend on the layout, too.
    dx, columns = linear.transposed_product(dy_TO), linear.split(dy_TO)
    gradients: list[Tensor | None] = []
    for (b, segments), hidden in zip(work, kept, strict=True):
        gradients += branch_gradients(columns[b.member], x_TI, b.A, b.B, segments, b.act, hidden, dx)
    return dx, gradients
