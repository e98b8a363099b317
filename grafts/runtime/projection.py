"""The frozen projections of one input, with the branches that read the same input added in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.grafts.runtime.beside import Plan
from polygraft.grafts.runtime.linear import FrozenLinear, Work
from polygraft.grafts.runtime.stacks import Entries
from polygraft.kernels.branch.cost import stacking_pays
from polygraft.kernels.branch.op import branch, serve_branch_
from polygraft.kernels.common.segments import Segments
from polygraft.kernels.dense.op import Side

BARE = Plan()


def project(
    x_TI: Tensor, linear: FrozenLinear, plan: Plan = BARE, segments: Callable[[Entries], Segments] | None = None
) -> tuple[Tensor, ...]:
    """x W_m^T, without the bias, plus the plan's branches beside m, for every projection m of `linear`; [T, width]
    each. `segments` gives the work list of a branch, as `RouteTable.segments`.

    Differentiable in x, A and B; never in W. In training all of it is one step of autograd: branches are summed
    into the products in place, forward and backward, and x is kept once for all of them.
    """
    listed = ((b, segments(b.entries)) for b in plan.beside) if segments is not None else ()
    work: Work = [Side(b.member, b.A, b.B, own, b.act) for b, own in listed if own.runs]
    trained = any(side.A.requires_grad or side.B.requires_grad for side in work)
    if torch.is_grad_enabled() and (x_TI.requires_grad or trained):
        if not x_TI.is_cuda:
            return _Project.apply(x_TI, linear, work, *_weights(work))  # type: ignore[no-any-return,no-untyped-call]
        products = list(_Project.apply(x_TI, linear, ()))  # type: ignore[no-untyped-call]
    elif linear.fuses or x_TI.is_cuda and not trained:
        products, work = linear.products(x_TI, work)
    elif trained or segments is None:
        products = list(linear.product(x_TI).split_with_sizes(linear.widths, dim=1))
    else:
        return _served(x_TI, linear, plan, work, segments)
    for member, A, B, own, act in work:
        products[member] = branch(x_TI, products[member], A, B, own, act)
    return tuple(products)


def project_alone(x_TI: Tensor, linear: FrozenLinear) -> tuple[Tensor, ...]:
    """The same without branches, for rows that are one graft's and whose count is never another."""
    return _Alone.apply(x_TI, linear)  # type: ignore[no-any-return,no-untyped-call]


def _served(
    x_TI: Tensor,
    linear: FrozenLinear,
    plan: Plan,
    work: Work,
    segments: Callable[[Entries], Segments],
) -> tuple[Tensor, ...]:
    """The projections where no gradient will be asked for; the branches of an activation in the cheaper of two
    forms."""
    y = linear.product(x_TI)
    for act in dict.fromkeys(side.act for side in work):
        own = [side for side in work if side.act == act]
        runs = [(run.count, run.rows, run.size) for side in own for run in side.segments.runs]
        ranks = sum(len(b.A) for b in plan.beside if b.act == act)
        if stacking_pays(len(x_TI), ranks, runs, linear.in_features, linear.out_features):
            together = plan.together(act, linear.widths)
            y = together.add(y, x_TI, segments(together.entries))
        else:
            products = y.split_with_sizes(linear.widths, dim=1)
            for side in own:
                serve_branch_(products[side.member], x_TI, side.A, side.B, side.segments, act)
    return y.split_with_sizes(linear.widths, dim=1)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, linear: FrozenLinear, work: Work, *weights: Tensor) -> tuple[Tensor, ...]:
        products, hiddens = linear.recorded(x, work)
        ctx.save_for_backward(x if work else None, *weights, *(h for group in hiddens for h in group))  # type: ignore[arg-type]  # None is allowed
        ctx.linear, ctx.beside = linear, [(s.member, s.segments, s.act) for s in work]  # type: ignore[attr-defined]
        ctx.kept = [len(group) for group in hiddens]  # type: ignore[attr-defined]
        return tuple(products)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        linear: FrozenLinear = ctx.linear  # type: ignore[attr-defined]
        beside, (x, *saved) = ctx.beside, ctx.saved_tensors  # type: ignore[attr-defined]
        weights, values = saved[: 2 * len(beside)], iter(saved[2 * len(beside) :])
        work = [
            Side(member, *pair, segments, act)
            for pair, (member, segments, act) in zip(zip(weights[::2], weights[1::2]), beside)
        ]
        hiddens = [list(islice(values, count)) for count in ctx.kept]  # type: ignore[attr-defined]
        dx, found = linear.gradients(_joined(grads), x, work, hiddens)
        return dx, None, None, *found


class _Alone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, linear: FrozenLinear) -> tuple[Tensor, ...]:
        ctx.linear = linear  # type: ignore[attr-defined]
        return linear.product_alone(x).split_with_sizes(linear.widths, dim=1)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        linear: FrozenLinear = ctx.linear  # type: ignore[attr-defined]
        return linear.transposed_alone(_joined(grads)), None


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Columns side by side: a view where they lie so already (`feedforward.swiglu`), else a copy."""
    first = parts[0]
    if len(parts) == 1:
        return first
    width, end = sum(part.shape[1] for part in parts), first.storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.stride() != (width, 1) or part.storage_offset() != end:
            return torch.cat(list(parts), dim=1)
        end += part.shape[1]
    return first.as_strided((len(first), width), (width, 1))


def _weights(work: Work) -> tuple[Tensor, ...]:
    return tuple(weight for side in work for weight in (side.A, side.B))
