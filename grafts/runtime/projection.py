"""The frozen projections of one input, with the branches that read the same input added in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.grafts.runtime.beside import Plan
from polygraft.grafts.runtime.linear import FrozenLinear
from polygraft.grafts.runtime.stacks import Entries
from polygraft.kernels.branch.cost import stacking_pays
from polygraft.kernels.branch.op import branch, serve_branch_
from polygraft.kernels.common.segments import Segments
from polygraft.kernels.dense.op import FusedBranch, Work

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
    work: Work = [(b, own) for b, own in listed if own.runs]
    if torch.is_grad_enabled() and (x_TI.requires_grad or _trained(work)):
        if not x_TI.is_cuda:
            return _Project.apply(x_TI, linear, work, *_weights(work))  # type: ignore[no-any-return,no-untyped-call]
        products = list(_Project.apply(x_TI, linear, ()))  # type: ignore[no-untyped-call]
    elif linear.fuses or x_TI.is_cuda and not _trained(work):
        products, work = linear.products(x_TI, work)
    elif segments is None or _trained(work):
        products, _ = linear.products(x_TI, ())
    else:
        return _served(x_TI, linear, plan, work, segments)
    for b, own in work:
        products[b.member] = branch(x_TI, products[b.member], b.A, b.B, own, b.act)
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
    for act in dict.fromkeys(b.act for b, _ in work):
        own = [(b, found) for b, found in work if b.act == act]
        runs = [(run.count, run.rows, run.size) for _, found in own for run in found.runs]
        ranks = sum(len(b.A) for b in plan.beside if b.act == act)
        if stacking_pays(len(x_TI), ranks, runs, linear.in_features, linear.out_features):
            together = plan.together(act, linear.widths)
            y = together.add(y, x_TI, segments(together.entries))
        else:
            products = y.split_with_sizes(linear.widths, dim=1)
            for b, found in own:
                serve_branch_(products[b.member], x_TI, b.A, b.B, found, act)
    return y.split_with_sizes(linear.widths, dim=1)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, linear: FrozenLinear, work: Work, *weights: Tensor) -> tuple[Tensor, ...]:
        products, hiddens = linear.recorded(x, work)
        ctx.save_for_backward(x if work else None, *weights, *(h for group in hiddens for h in group))  # type: ignore[arg-type]  # None is allowed
        ctx.linear, ctx.beside = linear, [(b.member, b.act, segments) for b, segments in work]  # type: ignore[attr-defined]
        ctx.kept = [len(group) for group in hiddens]  # type: ignore[attr-defined]
        return tuple(products)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        linear: FrozenLinear = ctx.linear  # type: ignore[attr-defined]
        beside, (x, *saved) = ctx.beside, ctx.saved_tensors  # type: ignore[attr-defined]
        weights, values = saved[: 2 * len(beside)], iter(saved[2 * len(beside) :])
        pairs = zip(weights[::2], weights[1::2])
        work = [(FusedBranch(member, *pair, act), segments) for pair, (member, act, segments) in zip(pairs, beside)]
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
    return tuple(weight for b, _ in work for weight in (b.A, b.B))


def _trained(work: Work) -> bool:
    return any(b.A.requires_grad or b.B.requires_grad for b, _ in work)
