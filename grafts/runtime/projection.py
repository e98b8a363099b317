"""The frozen projections of one input, with the branches that are fused into them; differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.grafts.runtime.fused import NONE, RoutedBranches
from polygraft.grafts.runtime.linears.protocol import FrozenLinear
from polygraft.kernels.branch.op import branch
from polygraft.kernels.dense.op import Work


def project(x_TI: Tensor, linear: FrozenLinear, branches: RoutedBranches = NONE) -> list[Tensor]:
    """x W_m^T, without the bias, plus the branches of m, for every projection m of `linear`; [T, width] each.

    Differentiable in x, A and B; never in W. In training all of it is one step of autograd, where the linear records
    branches: they are summed into the products in place, forward and backward, and x is kept once for all of them, if
    any A is trained: dB and dx are functions of A x and of the weights (LoRA-FA, Zhang et al. 2023).
    """
    rest = branches.work
    if not _differentiated(x_TI, branches):
        outputs, rest = linear.forward(x_TI, branches)
    elif linear.records(x_TI):
        outputs, rest = list(_Project.apply(x_TI, linear, branches, False, *_weights(rest))), ()  # type: ignore[no-untyped-call]
    else:
        outputs = list(_Project.apply(x_TI, linear, NONE, False))  # type: ignore[no-untyped-call]
    for b, segments in rest:
        outputs[b.member] = branch(x_TI, outputs[b.member], b.A, b.B, segments, b.act)
    return outputs


def project_joined(x_TI: Tensor, linear: FrozenLinear, branches: RoutedBranches = NONE) -> Tensor | None:
    """The same side by side in one tensor [T, out], whose gradient is one as well and need not be put together; None
    where that is not one step of autograd."""
    if not _differentiated(x_TI, branches) or (branches.work and not linear.records(x_TI)):
        return None
    return _Project.apply(x_TI, linear, branches, True, *_weights(branches.work))  # type: ignore[no-any-return,no-untyped-call]


def project_alone(x_TI: Tensor, linear: FrozenLinear) -> tuple[Tensor, ...]:
    """`project` without branches, for rows that are one graft's and whose count is never another."""
    return _Alone.apply(x_TI, linear, False)  # type: ignore[no-any-return,no-untyped-call]


def project_alone_joined(x_TI: Tensor, linear: FrozenLinear) -> Tensor:
    """The same side by side, as `project_joined`."""
    return _Alone.apply(x_TI, linear, True)  # type: ignore[no-any-return,no-untyped-call]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, linear: FrozenLinear, branches: RoutedBranches, joined: bool, *weights: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        y, kept = linear.record(x, branches)
        work = branches.work
        ctx.save_for_backward(x if any(b.A.requires_grad for b, _ in work) else None)  # type: ignore[arg-type]  # None is allowed
        # What is small, or lives on, is held as it is: autograd asks its hooks for every tensor that it saves.
        ctx.linear, ctx.work, ctx.kept = linear, work, kept  # type: ignore[attr-defined]
        return y if joined else tuple(linear.split(y))

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        linear: FrozenLinear = ctx.linear  # type: ignore[attr-defined]
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        dx, gradients = linear.backward(_side_by_side(grads), x, ctx.work, ctx.kept)  # type: ignore[attr-defined]
        return dx, None, None, None, *gradients


class _Alone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, linear: FrozenLinear, joined: bool) -> Tensor | tuple[Tensor, ...]:
        ctx.linear = linear  # type: ignore[attr-defined]
        y = linear.product_alone(x)
        return y if joined else tuple(linear.split(y))

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        linear: FrozenLinear = ctx.linear  # type: ignore[attr-defined]
        return linear.transposed_alone(_side_by_side(grads)), None, None


def _differentiated(x: Tensor, branches: RoutedBranches) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or branches.trained)


def _side_by_side(columns: tuple[Tensor, ...]) -> Tensor:
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def _weights(work: Work) -> tuple[Tensor, ...]:
    return tuple(weight for b, _ in work for weight in (b.A, b.B))
