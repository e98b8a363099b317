"""The modules that stand at the sites of an unmodified transformers class and run the plans of the rows that pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from polygraft.grafts.runtime.linears.protocol import FrozenLinear
from polygraft.grafts.runtime.norms import FrozenNorm
from polygraft.grafts.runtime.plans import linear_plan, output_plan, run
from polygraft.grafts.runtime.recompute import recomputed
from polygraft.grafts.runtime.route import current
from polygraft.grafts.runtime.steps import SharedProduct
from polygraft.grafts.sites import Site


class SiteLinear(nn.Module):
    """A projection: the projection `member` among `group`, the sites whose weights are fused in one FrozenLinear."""

    weight = None  # T5 asks for its dtype, if it has one

    def __init__(self, group: Sequence[Site], linear: FrozenLinear, member: int) -> None:
        super().__init__()
        self.group, self.linear, self.member = tuple(group), linear, member
        self.site = self.group[member]

    def forward(self, x: Tensor) -> Tensor:
        route, flat = current().at(self.site), x.view(-1, x.shape[-1])
        y = run(linear_plan(self.group, self.member, self.linear, route), flat, flat, route)
        return y.view(*x.shape[:-1], -1)


def joined(members: Sequence[SiteLinear], x: Tensor) -> Tensor | None:
    """The outputs of all members of a fused linear side by side, where each is the product with its fused branches and
    nothing follows, in one step of autograd; else None, as where somebody listens to a member's own output."""
    if any(one._forward_hooks for one in members):
        return None
    route, flat = current().at(members[0].site), x.view(-1, x.shape[-1])
    plans = [linear_plan(one.group, one.member, one.linear, route) for one in members]
    (shared, *_) = plans[0]
    if any(len(plan) > 1 for plan in plans) or not isinstance(shared, SharedProduct):
        return None
    y = shared.joined(flat, route)
    return None if y is None else y.view(*x.shape[:-1], -1)


class FusedProjection(nn.Module):
    """The projections that transformers has as one module: their outputs side by side, or with `heads` side by side in
    every head."""

    def __init__(self, members: Sequence[SiteLinear], heads: int | None) -> None:
        super().__init__()
        self.members, self.heads = nn.ModuleList(members), heads

    def forward(self, x: Tensor) -> Tensor:
        products = [_OwnGradient.apply(member(x)) for member in self.members]  # type: ignore[no-untyped-call]
        if self.heads is None:
            return torch.cat(products, dim=-1)
        return torch.cat([torch.unflatten(y, -1, (self.heads, -1)) for y in products], dim=-1).flatten(-2)


class _OwnGradient(torch.autograd.Function):
    """x, whose gradient lies in memory of its own and not among others': a batched product chooses its order of sums by
    the layout, too."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return grad.contiguous()


class Sublayer(nn.Module):
    """Attention or feed-forward as a whole, with the ops on its output before the residual sum; or a whole layer, with
    those on the residual stream after it.

    `inner` is the whole of it, or with `ends` its last part, whose input is not the sublayer's: that is what the
    `SublayerInput` of the same site saw. `norm` is the site of the norm whose output `inner` reads, where there is one.
    """

    def __init__(self, site: Site, inner: nn.Module, *, ends: bool = False, norm: Site | None = None) -> None:
        super().__init__()
        self.site, self.inner, self.ends, self.norm = site, inner, ends, norm

    def forward(self, *args: Tensor, **kwargs: object) -> Tensor | tuple[Tensor, ...]:
        x = args[0] if args else kwargs["hidden_states"]
        assert isinstance(x, Tensor)
        route = current()
        with recomputed(x, None if self.norm is None else route.context.norms.pop(self.norm, None)):
            result = self.inner(*args, **kwargs)
        plan = output_plan(self.site, route.stacks)
        if not plan:
            return result  # type: ignore[no-any-return]
        if self.ends:
            x = route.context.inputs.pop(self.site)
        out: Tensor = result[0] if isinstance(result, tuple) else result
        y = run(plan, x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1]), route).view(out.shape)
        return (y, *result[1:]) if isinstance(result, tuple) else y


class Layer(Sublayer):
    """A whole layer, which rows that enter above it pass by, and at which a backward ends when no graft is below."""

    def forward(self, *args: Tensor, **kwargs: object) -> Tensor | tuple[Tensor, ...]:
        route = current()
        if args and 0 < self.site.layer == route.lowest and args[0].requires_grad:
            args = (args[0].detach().requires_grad_(), *args[1:])
        if (entry := route.entry) is not None:
            x, *others = args
            if self.site.layer < entry.layer:
                return x
            if self.site.layer == entry.layer:
                args = (F.pad(entry.rows, (0, 0, 0, x.shape[1] - len(entry.rows)))[None], *others)
        return super().forward(*args, **kwargs)


class SublayerInput(nn.Module):
    """The part of a sublayer that takes its input first."""

    def __init__(self, site: Site, inner: nn.Module) -> None:
        super().__init__()
        self.site, self.inner = site, inner

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> object:
        route = current()
        if output_plan(self.site, route.stacks):
            route.context.inputs[self.site] = x
        return self.inner(x, *args, **kwargs)


class SiteNorm(nn.Module):
    """A frozen norm, and the ops of the rows' grafts after it."""

    def __init__(self, site: Site | None, norm: FrozenNorm) -> None:
        super().__init__()
        self.site, self.norm = site, norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.site is None:
            return y
        route = current()
        plan = output_plan(self.site, route.stacks)
        if plan:
            flat = y.view(-1, y.shape[-1])
            return run(plan, flat, flat, route).view(y.shape)
        source = x.detach()
        route.context.norms[self.site] = lambda: self.norm(source)
        return y
