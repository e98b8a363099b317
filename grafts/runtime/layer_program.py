"""All layers of a decoder as a list of calls, for the rows of one forward and all that have as many under the same
grafts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from polygraft.grafts.runtime.cache import KVCache, PagedAttention
from polygraft.grafts.runtime.modules import SiteLinear, SiteNorm
from polygraft.grafts.runtime.plans import Plan, branches_of, linear_plan, output_plan, run
from polygraft.grafts.runtime.projection import project
from polygraft.grafts.runtime.route import RouteTable
from polygraft.grafts.runtime.steps import Product, SharedProduct
from polygraft.grafts.sites import Site
from polygraft.kernels.common.compiled import Call, Calls
from polygraft.kernels.kv import paged
from polygraft.kernels.kv.scores import Scores
from polygraft.kernels.residual_norm import op as residual_norm
from polygraft.kernels.rotary import op as rotary
from polygraft.kernels.swiglu import op as swiglu


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """The frozen parts of a layer; `projections` are the first of each fused linear, by site name."""

    layer: int
    norms: tuple[SiteNorm, SiteNorm]
    projections: Mapping[str, SiteLinear]
    head_norms: rotary.HeadNorms | None
    scores: Scores


class _Uncompiled(Exception):
    """A call that this machine or these dtypes have no compiled function for."""


@dataclass(frozen=True, slots=True)
class LayerProgram:
    """What changes from forward to forward is in `residual`, `angles`, `slots` and `pages`, where the steps read it."""

    rotary: nn.Module
    residual: Tensor  # [T, hidden]
    angles: tuple[Tensor, Tensor]
    slots: Tensor
    pages: paged.Pages
    out: Tensor
    steps: Sequence[Callable[[], None]]

    def run(self, x_TD: Tensor, positions_T: Tensor, attention: PagedAttention) -> Tensor:
        """States after the final norm."""
        self.residual.copy_(x_TD)
        for held, angle in zip(self.angles, self.rotary(x_TD[None], positions_T[None]), strict=True):
            held.copy_(angle[0])
        self.slots.copy_(torch.tensor(attention.slots(len(x_TD))))
        attention.hold(self.pages)
        for step in self.steps:
            step()
        return self.out.clone()


def program(
    layers: Sequence[PlannedLayer], final: SiteNorm, angles: nn.Module, x_TD: Tensor, cache: KVCache, route: RouteTable
) -> LayerProgram | None:
    """For forwards of as many rows as x under the route's spans; None where the calls are not compiled."""
    cos, _ = angles(x_TD[None], torch.zeros(1, len(x_TD), dtype=torch.long))
    shared = _Shared(x_TD, cos.shape[-1], cache, route, layers)
    try:
        for planned in layers:
            shared.add(planned)
        shared.add_norm(final)
    except _Uncompiled:
        return None
    steps: list[Callable[[], None]] = []
    for compiled, own in groupby(shared.steps, lambda step: isinstance(step, Call)):
        steps += [Calls([step for step in own if isinstance(step, Call)])] if compiled else own
    return LayerProgram(angles, shared.residual, shared.angles, shared.slots, shared.pages, shared.normed, steps)


class _Shared:
    """The tensors that all layers write to in turn, and the steps so far."""

    def __init__(
        self, x_TD: Tensor, turned: int, cache: KVCache, route: RouteTable, layers: Sequence[PlannedLayer]
    ) -> None:
        def rows(width: int) -> Tensor:
            return torch.zeros(len(x_TD), width, dtype=x_TD.dtype, device=x_TD.device)

        linears = {name: one.linear for name, one in layers[0].projections.items()}
        self.residual, self.update, self.normed = (rows(x_TD.shape[1]) for _ in range(3))
        self.fused, self.attended = rows(linears["attn.q"].out_features), rows(linears["attn.o"].in_features)
        self.factors, self.product = rows(linears["ffn.gate"].out_features), rows(linears["ffn.down"].in_features)
        self.angles = rows(turned), rows(turned)
        self.slots = torch.full((len(x_TD),), -1, dtype=torch.long)
        self.pages = paged.Pages()
        self.steps: list[Callable[[], None]] = []
        self._cache, self._route, self._threads = cache, route, torch.get_num_threads()

    def add(self, planned: PlannedLayer) -> None:
        """A layer's steps, up to the sum of its last sublayer, which the next norm adds."""
        layer, projections = planned.layer, planned.projections
        self.add_norm(planned.norms[0], first=layer == 0)
        self._project(projections["attn.q"], self.normed, self.fused)
        self._attend(planned)
        self._project(projections["attn.o"], self.attended, self.update)
        self._after(output_plan(Site(layer, "attn.out"), self._route.stacks), self.normed, self.update)
        self.add_norm(planned.norms[1])
        self._project(projections["ffn.gate"], self.normed, self.factors)
        gate, up = self.factors.split_with_sizes(projections["ffn.gate"].linear.widths, dim=1)
        self._call(swiglu.ready(gate, up, self.product, threads=self._threads))
        self._project(projections["ffn.down"], self.product, self.update)
        self._after(output_plan(Site(layer, "ffn.out"), self._route.stacks), self.normed, self.update)

    def add_norm(self, site_norm: SiteNorm, *, first: bool = False) -> None:
        """The residual sum and the norm after it; before the first layer there is nothing to add."""
        update = None if first else self.update
        self._call(residual_norm.ready(self.residual, update, site_norm.norm, self.normed, threads=self._threads))
        assert site_norm.site is not None
        self._after(output_plan(site_norm.site, self._route.stacks), self.normed, self.normed)

    def _attend(self, planned: PlannedLayer) -> None:
        linear, shape = planned.projections["attn.q"].linear, self._cache.shape
        q, k, v = self.fused.split_with_sizes(linear.widths, dim=1)
        data = self._cache.data[planned.layer]
        turn = rotary.ready(
            *(q, k, v, self.angles, data, self.slots, shape.head_dim, planned.head_norms), threads=self._threads
        )
        heads = shape.heads, shape.kv_heads
        attend = paged.ready(
            *(q, self.attended, data, self.pages, planned.layer, heads, planned.scores), threads=self._threads
        )
        self._call(turn)
        self._call(attend)

    def _project(self, first: SiteLinear, x: Tensor, out: Tensor) -> None:
        """The products of a fused linear and what follows them at each of its sites."""
        linear, route = first.linear, self._route
        fused, _ = branches_of(first.group, route.stacks)
        branches = fused.routed(route.segments)
        columns = out.split_with_sizes(linear.widths, dim=1)
        ready = linear.ready(x, branches, out)

        def multiply() -> None:
            for into, y in zip(columns, project(x, linear, branches), strict=True):
                into.copy_(y)

        self.steps.append(multiply if ready is None else ready)
        for member, y in enumerate(columns):
            steps = linear_plan(first.group, member, linear, route)
            self._after(tuple(step for step in steps if not isinstance(step, Product | SharedProduct)), x, y)

    def _after(self, plan: Plan, x: Tensor, y: Tensor) -> None:
        """What grafts do at a site whose own function has written y."""
        if not plan:
            return

        def follow() -> None:
            y.copy_(run(plan, x, y, self._route))

        self.steps.append(follow)

    def _call(self, call: Call | None) -> None:
        if call is None:
            raise _Uncompiled
        self.steps.append(call)
