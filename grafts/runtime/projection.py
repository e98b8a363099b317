"""The frozen projections of one input, with the branches that read the same input added in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.grafts.runtime.linear import FrozenLinear
from polygraft.kernels.branch.op import add_branch_, branch, branch_gradients, serve_branch_
from polygraft.kernels.common.segments import Segments


@dataclass(frozen=True, slots=True)
class Beside:
    """A branch beside projection `member` of a fused linear, as `kernels.branch.op.branch` takes it."""

    member: int
    A: Tensor
    B: Tensor
    segments: Segments
    act: str


def project(x_TI: Tensor, linear: FrozenLinear, beside: Sequence[Beside]) -> tuple[Tensor, ...]:
    """x W_m^T, without the bias, plus the branches beside m, for every projection m of `linear`; [T, width] each.

    Differentiable in x, A and B; never in W. In training all of it is one step of autograd: branches are summed
    into the products in place, forward and backward, and x is kept once for all of them.
    """
    beside = [b for b in beside if b.segments.runs]
    if torch.is_grad_enabled() and (x_TI.requires_grad or any(b.A.requires_grad for b in beside)):
        if not x_TI.is_cuda:
            return _Project.apply(x_TI, linear, beside, *_weights(beside))  # type: ignore[no-any-return,no-untyped-call]
        products = list(_Project.apply(x_TI, linear, ()))  # type: ignore[no-untyped-call]
    else:
        products = list(linear.product(x_TI).split_with_sizes(linear.widths, dim=1))
        if not x_TI.is_cuda and not any(b.A.requires_grad or b.B.requires_grad for b in beside):
            for b in beside:
                serve_branch_(products[b.member], x_TI, b.A, b.B, b.segments, b.act)
            return tuple(products)
    for b in beside:
        products[b.member] = branch(x_TI, products[b.member], b.A, b.B, b.segments, b.act)
    return tuple(products)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, linear: FrozenLinear, beside: Sequence[Beside], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        products = linear.product(x).split_with_sizes(linear.widths, dim=1)
        hiddens = [add_branch_(products[b.member], x, b.A, b.B, b.segments, b.act) for b in beside]
        ctx.save_for_backward(x if beside else None, *weights, *(h for group in hiddens for h in group))  # type: ignore[arg-type]  # None is allowed
        ctx.linear, ctx.beside = linear, [(b.member, b.segments, b.act) for b in beside]  # type: ignore[attr-defined]
        return products

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        linear, beside = ctx.linear, ctx.beside  # type: ignore[attr-defined]
        x, *saved = ctx.saved_tensors  # type: ignore[attr-defined]
        weights, hiddens = saved[: 2 * len(beside)], iter(saved[2 * len(beside) :])
        dx = linear.transposed_product(grads[0] if len(grads) == 1 else torch.cat(grads, dim=1))
        found: list[Tensor | None] = []
        for i, (member, segments, act) in enumerate(beside):
            own = [next(hiddens) for _ in segments.runs]
            A, B = weights[2 * i : 2 * i + 2]
            found += branch_gradients(grads[member], x, A, B, segments, act, own, dx)
        return dx, None, None, *found


def _weights(beside: Sequence[Beside]) -> tuple[Tensor, ...]:
    return tuple(weight for b in beside for weight in (b.A, b.B))
