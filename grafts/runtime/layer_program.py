"""All layers of a decoder as a list of calls, for the rows of one forward and all that have as many under the same
grafts, or no more of no graft's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import c_int64
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polygraft.grafts.runtime.cache import KVCache, PagedAttention
from polygraft.grafts.runtime.modules import SiteLinear, SiteNorm
from polygraft.grafts.runtime.plans import Plan, branches_of, linear_plan, output_plan, run
from polygraft.grafts.runtime.projection import project
from polygraft.grafts.runtime.route import RouteTable
from polygraft.grafts.runtime.steps import Product, SharedProduct
from polygraft.grafts.sites import Site
from polygraft.kernels.compiled.calls import Call, Calls
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


@dataclass(frozen=True, slots=True)
class PlannedLayers:
    """All layers, the norm after them, and the module that makes the angles of positions."""

    layers: tuple[PlannedLayer, ...]
    final: SiteNorm
    rotary: nn.Module


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
    rows: Sequence[c_int64]  # of every step, where all steps are calls of the bare model's

    def takes(self, rows: int) -> bool:
        """Whether it is for any number of rows, and has room for so many."""
        return bool(self.rows) and rows <= len(self.residual)

    def run(self, x_TD: Tensor, positions_T: Tensor, attention: PagedAttention) -> Tensor:
        """States after the final norm."""
        count = len(x_TD)
        for rows in self.rows:
            rows.value = count
        self.residual[:count].copy_(x_TD)
        for held, angle in zip(self.angles, self.rotary(x_TD[None], positions_T[None]), strict=True):
            held[:count].copy_(angle[0])
        self.slots[:count].copy_(torch.tensor(attention.slots(count)))
        attention.hold(self.pages)
        for step in self.steps:
            step()
        return self.out[:count].clone()


def program(planned: PlannedLayers, x_TD: Tensor, cache: KVCache, route: RouteTable, rows: int) -> LayerProgram | None:
    """For forwards of so many rows like those of x under the route's spans; None where the calls are not compiled."""
    angles, _ = planned.rotary(x_TD[None], torch.zeros(1, len(x_TD), dtype=torch.long))
    shared = _Shared(x_TD, rows, angles.shape[-1], planned.layers[0], cache, route)
    try:
        for layer in planned.layers:
            shared.add(layer)
        shared.add_norm(planned.final)
    except _Uncompiled:
        return None
    held = shared.residual, shared.angles, shared.slots, shared.pages, shared.normed
    places = [step.rows for step in shared.steps if isinstance(step, Call) and step.rows and not route.spans]
    lengths = [c_int64.from_address(place) for place in places] if len(places) == len(shared.steps) else ()
    return LayerProgram(planned.rotary, *held, tuple(_joined(shared.steps)), lengths)


def _joined(steps: Sequence[Callable[[], None]]) -> Iterator[Callable[[], None]]:
    """Calls that follow each other as one step."""
    waiting: list[Call] = []
    for step in steps:
        if isinstance(step, Call):
            waiting.append(step)
            continue
        if waiting:
            yield Calls(waiting)
        waiting = []
        yield step
    if waiting:
        yield Calls(waiting)


class _Shared:
    """The tensors that all layers write to in turn, and the steps so far."""

    def __init__(
        self, x_TD: Tensor, count: int, turned: int, like: PlannedLayer, cache: KVCache, route: RouteTable
    ) -> None:
        def rows(width: int) -> Tensor:
            return torch.zeros(count, width, dtype=x_TD.dtype, device=x_TD.device)

        linears = {name: one.linear for name, one in like.projections.items()}
        self.residual, self.update, self.normed = (rows(x_TD.shape[1]) for _ in range(3))
        self.fused, self.attended = rows(linears["attn.q"].out_features), rows(linears["attn.o"].in_features)
        self.factors, self.product = rows(linears["ffn.gate"].out_features), rows(linears["ffn.down"].in_features)
        self.angles = rows(turned), rows(turned)
        self.slots = torch.full((count,), -1, dtype=torch.long)
        self.pages = paged.Pages()
        self.steps: list[Callable[[], None]] = []
        self._cache, self._route = cache, route

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
        self._call(swiglu.ready(gate, up, self.product))
        self._project(projections["ffn.down"], self.product, self.update)
        self._after(output_plan(Site(layer, "ffn.out"), self._route.stacks), self.normed, self.update)

    def add_norm(self, site_norm: SiteNorm, *, first: bool = False) -> None:
        """The residual sum and the norm after it; before the first layer there is nothing to add."""
        update = None if first else self.update
        self._call(residual_norm.ready(self.residual, update, site_norm.norm, self.normed))
        assert site_norm.site is not None
        self._after(output_plan(site_norm.site, self._route.stacks), self.normed, self.normed)

    def _attend(self, planned: PlannedLayer) -> None:
        linear, shape = planned.projections["attn.q"].linear, self._cache.shape
        q, k, v = self.fused.split_with_sizes(linear.widths, dim=1)
        data = self._cache.data[planned.layer]
        layer = paged.PagedLayer(planned.layer, shape.heads, shape.kv_heads, planned.scores)
        self._call(rotary.ready((q, k, v), self.angles, data, self.slots, shape.heads, planned.head_norms))
        self._call(paged.ready(q, self.attended, data, self.pages, layer))

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
