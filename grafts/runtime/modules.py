"""The modules that stand at the sites of an unmodified transformers class and run the ops of the rows that pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from polygraft.grafts.runtime.beside import Plan, activation, changes
from polygraft.grafts.runtime.linear import FrozenLinear
from polygraft.grafts.runtime.norms import FrozenNorm
from polygraft.grafts.runtime.projection import project, project_alone
from polygraft.grafts.runtime.recompute import recomputed
from polygraft.grafts.runtime.route import RouteTable, current
from polygraft.grafts.runtime.stacks import Entries, Kind, Stack
from polygraft.grafts.sites import KV_SITE, Site
from polygraft.kernels.affine.op import affine
from polygraft.kernels.branch.gated import gated
from polygraft.kernels.branch.noisy import noisy
from polygraft.kernels.branch.op import branch
from polygraft.kernels.common.dropout import dropout
from polygraft.kernels.common.gate import Gate
from polygraft.kernels.delta.op import delta
from polygraft.kernels.rotate.op import rotate
from polygraft.kernels.sparse.op import sparse


class SiteLinear(nn.Module):
    """A projection: rotate and affine on x, then W x plus the branches, sparse and delta, norm, bias, affine and rotate
    on y, for the rows of each graft.

    `member` is the projection's place among `group`, the sites whose weights are fused in one FrozenLinear; the member
    that runs first computes all of them, with the branches that read what they all read. Rows whose graft changes this
    projection's input take a product and branches of their own.
    """

    weight = None  # T5 asks for its dtype, if it has one

    def __init__(self, group: Sequence[Site], linear: FrozenLinear, member: int) -> None:
        super().__init__()
        self.group, self.linear, self.member = tuple(group), linear, member
        self.site, self.bias = self.group[member], linear.biases()[member]
        self.beside = Site(self.site.layer, KV_SITE)

    def forward(self, x: Tensor) -> Tensor:
        route = current().at(self.site)
        stacks, plan = route.stacks.get(self.site), self._plan(route)
        flat = x.view(-1, x.shape[-1])
        if self.site.name == "attn.q" and any(kind.gate for kind in route.stacks.get(self.beside)):
            route.enter(self.beside, flat)  # the gates of prefix rows read what attention reads
        changing = [stack for kind, stack in stacks.items() if changes(kind, "in")]
        if len(self.group) == 1:
            for stack in changing:
                flat = _changed(flat, stack, route)
            y = self._products(flat, plan, route)[0]
        else:
            # Before the changes, so that a backward sums the gradient of x in one order with them and without.
            y = self._shared(x, flat, plan, route)
            for stack in changing:
                flat = _changed(flat, stack, route)
            if changing:
                own = project(flat, self.linear)[self.member]
                y = torch.where(_rows(changing, flat, route), own, y)
        y = _branches(flat, y, stacks, self.site, route, tap="input", among=plan.apart[self.member])
        for kind, stack in stacks.items():
            if kind.op == "sparse":
                index = route.stacks.sparse_index(self.site, kind)
                y = sparse(flat, y, stack.parts["w"], index, route.segments(stack.entries))
            if kind.op == "delta":
                generators = route.stacks.generators[self.site]
                y = delta(flat, y, stack.parts["t"], route.segments(stack.entries), generators)
        for kind, stack in stacks.items():
            if kind.op == "norm":
                y = affine(y, stack.parts["m"] / stack.parts["norm"], None, route.segments(stack.entries))
        for kind, stack in stacks.items():
            if changes(kind, "rows"):
                y = _changed(y, stack, route)
        if self.bias is not None:
            y = y + self.bias
        y = _changed_out(y, stacks, route)
        return y.view(*x.shape[:-1], -1)

    def _shared(self, x: Tensor, flat: Tensor, plan: Plan, route: RouteTable) -> Tensor:
        """This projection's product, computed together with the others that take the same input."""
        found = route.kept(id(self.linear), x, self.member)
        if found is None:
            products = list(self._products(flat, plan, route))
            route.keep(id(self.linear), x, products)
            found = products[self.member]
        return found

    def _products(self, flat: Tensor, plan: Plan, route: RouteTable) -> tuple[Tensor, ...]:
        if route.enters is not None:
            return project_alone(flat, self.linear)
        return project(flat, self.linear, plan, route.segments)

    def _plan(self, route: RouteTable) -> Plan:
        key = id(self.linear), route.dropout_keys is not None
        if key not in route.stacks.plans:
            route.stacks.plans[key] = Plan.of(self.group, route.stacks, dropping=key[1])
        return route.stacks.plans[key]


class FusedProjection(nn.Module):
    """The projections that transformers has as one module: their outputs side by side, or with `heads` side by side in
    every head."""

    def __init__(self, members: Sequence[SiteLinear], heads: int | None) -> None:
        super().__init__()
        self.members, self.heads = nn.ModuleList(members), heads

    def forward(self, x: Tensor) -> Tensor:
        products = [_Lone.apply(member(x)) for member in self.members]  # type: ignore[no-untyped-call]
        if self.heads is None:
            return torch.cat(products, dim=-1)
        return torch.cat([torch.unflatten(y, -1, (self.heads, -1)) for y in products], dim=-1).flatten(-2)


class _Lone(torch.autograd.Function):
    """x, whose gradient lies in memory of its own and not among others': a batched product chooses its order of sums by
    the layout, too."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return grad.contiguous()


class Sublayer(nn.Module):
    """Attention or feed-forward as a whole, branches and affines on its output before the residual sum; or a whole
    layer, the same on the residual stream after it.

    `inner` is the whole of it, or with `apart` its last part, whose input is not the sublayer's: that is what a
    `SublayerInput` of the same site saw.
    """

    def __init__(self, site: Site, inner: nn.Module, *, apart: bool = False) -> None:
        super().__init__()
        self.site, self.inner, self.apart = site, inner, apart

    def forward(self, *args: Tensor, **kwargs: object) -> Tensor | tuple[Tensor, ...]:
        x = args[0] if args else kwargs["hidden_states"]
        assert isinstance(x, Tensor)
        route = current()
        with recomputed(x, route.recipe(x)):
            result = self.inner(*args, **kwargs)
        stacks = route.stacks.get(self.site)
        if not stacks:
            return result  # type: ignore[no-any-return]
        if self.apart:
            x = route.entered(self.site)
        out: Tensor = result[0] if isinstance(result, tuple) else result
        flat = out.view(-1, out.shape[-1])
        y = _branches(x.view(-1, x.shape[-1]), flat, stacks, self.site, route, tap="input")
        y = _branches(flat, y, stacks, self.site, route, tap="output")
        y = _changed_out(y, stacks, route).view(out.shape)
        return (y, *result[1:]) if isinstance(result, tuple) else y


class Layer(Sublayer):
    """A whole layer, which rows that enter above it pass by."""

    def forward(self, *args: Tensor, **kwargs: object) -> Tensor | tuple[Tensor, ...]:
        if (entry := current().enters) is not None:
            first, rows = entry
            x, *others = args
            if self.site.layer < first:
                return x
            if self.site.layer == first:
                args = (F.pad(rows, (0, 0, 0, x.shape[1] - len(rows)))[None], *others)
        return super().forward(*args, **kwargs)


class SublayerInput(nn.Module):
    """The part of a sublayer that takes its input first."""

    def __init__(self, site: Site, inner: nn.Module) -> None:
        super().__init__()
        self.site, self.inner = site, inner

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> object:
        route = current()
        if route.stacks.get(self.site):
            route.enter(self.site, x)
        return self.inner(x, *args, **kwargs)


class SiteNorm(nn.Module):
    """A frozen norm, and the affines of the rows' grafts after it."""

    def __init__(self, site: Site | None, norm: FrozenNorm) -> None:
        super().__init__()
        self.site, self.norm = site, norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.site is None:
            return y
        route = current()
        stacks = route.stacks.get(self.site)
        if stacks:
            return _changed_out(y.view(-1, y.shape[-1]), stacks, route).view(y.shape)
        source = x.detach()
        route.remember(y, lambda: self.norm(source))
        return y


def _branches(
    x: Tensor,
    y: Tensor,
    stacks: Mapping[Kind, Stack],
    site: Site,
    route: RouteTable,
    *,
    tap: str,
    among: Entries | None = None,
) -> Tensor:
    """y plus the branches at a tap; of those without a gate only `among`, where given."""
    for kind, stack in stacks.items():
        if kind.op == "gated" and kind.variant.startswith(tap):
            _, act, gate, top, count = kind.variant.split(".")
            segments, gates = route.segments(stack.entries), route.segments(stack.gates)
            A, B, G = (stack.parts[part] for part in "ABG")
            if gate == "noise":
                y = noisy(x, y, A, B, G, segments, gates, route.dropout_keys, _site_key(site, kind))
            else:
                y = gated(x, y, A, B, G, segments, gates, act, Gate(gate, int(top), int(count)))
        if kind.op == "branch" and kind.variant.startswith(tap):
            entries = stack.entries if among is None else tuple(entry for entry in stack.entries if entry in among)
            segments = route.segments(entries)
            into = x
            if segments.dropped and route.dropout_keys is not None:
                into = dropout(x, segments, route.dropout_keys, _site_key(site, kind))
            y = branch(into, y, stack.parts["A"], stack.parts["B"], segments, activation(kind), stack.parts.get("a"))
    return y


def _site_key(site: Site, kind: Kind) -> int:
    """What random numbers at a site are hashed with."""
    return crc32(f"{site}.{kind.variant}".encode()) - (1 << 31)


def _changed_out(y: Tensor, stacks: Mapping[Kind, Stack], route: RouteTable) -> Tensor:
    """Affines on y, then rotations."""
    for op in ("affine", "rotate"):
        for kind, stack in stacks.items():
            if kind.op == op and changes(kind, "out"):
                y = _changed(y, stack, route)
    return y


def _rows(stacks: Sequence[Stack], x: Tensor, route: RouteTable) -> Tensor:
    """[T, 1] bool: the rows of x under the stacks' grafts."""
    mask = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
    for segment in (segment for stack in stacks for segment in route.segments(stack.entries)):
        mask[segment.start : segment.stop] = True
    return mask


def _changed(y: Tensor, stack: Stack, route: RouteTable) -> Tensor:
    if stack.kind.op == "rotate":
        return rotate(y, stack.parts, stack.kind.variant.partition(".")[2], route.segments(stack.entries))
    return affine(y, stack.parts.get("g"), stack.parts.get("b"), route.segments(stack.entries))
