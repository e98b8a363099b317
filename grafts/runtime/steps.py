"""The steps of a site plan: what one op, or the site's own function, does to the rows that pass.

Steps hold the stacks' tensors, which are filled in place, and ask the route for the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from polygraft.grafts.runtime.fused import FusedBranches
from polygraft.grafts.runtime.keys import (
    AffineKey,
    BranchKey,
    DeltaKey,
    GatedKey,
    NoisyKey,
    NormKey,
    OpKey,
    RotateKey,
    SparseKey,
)
from polygraft.grafts.runtime.linears.protocol import FrozenLinear
from polygraft.grafts.runtime.projection import project, project_alone, project_alone_joined, project_joined
from polygraft.grafts.runtime.route import RouteTable
from polygraft.grafts.runtime.stack import Stack, StackSlices
from polygraft.grafts.runtime.stacks import Stacks
from polygraft.grafts.runtime.streams import stream
from polygraft.grafts.sites import Site
from polygraft.kernels.affine.op import affine
from polygraft.kernels.branch.gated import gated
from polygraft.kernels.branch.noisy import noisy
from polygraft.kernels.branch.op import branch
from polygraft.kernels.common.dropout import dropout
from polygraft.kernels.delta.op import Generate, delta
from polygraft.kernels.rotate.op import rotate
from polygraft.kernels.rotate.rotation import Rotation
from polygraft.kernels.sparse.op import sparse
from polygraft.kernels.sparse.order import SparseIndex


@dataclass(slots=True)
class Passing:
    """The rows of a forward while they pass a site: x [T, in] has entered, `own` [T, out] is what the site's own
    function made of it, y [T, out] is to leave. Until that function has run all of them are x."""

    x: Tensor
    own: Tensor
    y: Tensor


class Step(Protocol):
    def __call__(self, rows: Passing, route: RouteTable) -> None:
        """Replaces what passes."""
        ...


class Change(Protocol):
    def __call__(self, t: Tensor, route: RouteTable) -> Tensor:
        """[T, D], changed in the rows of the grafts that do so."""
        ...


@dataclass(frozen=True, slots=True)
class OnInput:
    change: Change

    def __call__(self, rows: Passing, route: RouteTable) -> None:
        rows.x = self.change(rows.x, route)


@dataclass(frozen=True, slots=True)
class OnOutput:
    change: Change

    def __call__(self, rows: Passing, route: RouteTable) -> None:
        rows.y = self.change(rows.y, route)


@dataclass(frozen=True, slots=True)
class Product:
    """The projection by itself, with the branches that are fused into it."""

    linear: FrozenLinear
    fused: FusedBranches

    def __call__(self, rows: Passing, route: RouteTable) -> None:
        rows.own = rows.y = products(rows.x, self.linear, self.fused, route)[0]


@dataclass(frozen=True, slots=True)
class SharedProduct:
    """The projection among others that take the same input and are multiplied as one; the member that runs first
    computes all of them."""

    group: Site  # the first of the members
    member: int
    linear: FrozenLinear
    fused: FusedBranches

    def __call__(self, rows: Passing, route: RouteTable) -> None:
        waiting = route.context.products.pop(self.group, None)
        if waiting is None:
            waiting = dict(enumerate(products(rows.x, self.linear, self.fused, route)))
        rows.own = rows.y = waiting.pop(self.member)
        if waiting:
            route.context.products[self.group] = waiting

    def joined(self, x: Tensor, route: RouteTable) -> Tensor | None:
        """All members side by side, [T, out]; None where that is not one step of autograd."""
        if route.entry is not None:
            return project_alone_joined(x, self.linear)
        return project_joined(x, self.linear, self.fused.routed(route.segments))


@dataclass(frozen=True, slots=True)
class OwnProduct:
    """The projection once more, for the rows whose graft changes an input that others share."""

    member: int
    linear: FrozenLinear
    changing: tuple[StackSlices, ...]

    def __call__(self, rows: Passing, route: RouteTable) -> None:
        own = project(rows.x, self.linear)[self.member]
        rows.own = rows.y = torch.where(_rows(self.changing, rows.x, route), own, rows.y)


@dataclass(frozen=True, slots=True)
class KeepInput:
    """Leaves what enters for the end of a site: gates of prefix rows read what attention reads."""

    site: Site

    def __call__(self, rows: Passing, route: RouteTable) -> None:
        route.context.inputs[self.site] = rows.x


@dataclass(frozen=True, slots=True)
class AddBranch:
    A: Tensor
    B: Tensor
    a: Tensor | None
    key: BranchKey
    slices: StackSlices
    stream: int

    def __call__(self, rows: Passing, route: RouteTable) -> None:
        read = rows.x if self.key.tap == "input" else rows.own
        segments = route.segments(self.slices)
        if segments.dropped and route.dropout_keys is not None:
            read = dropout(read, segments, route.dropout_keys, self.stream)
        rows.y = branch(read, rows.y, self.A, self.B, segments, self.key.act, self.a)


@dataclass(frozen=True, slots=True)
class AddGated:
    stack: Stack
    key: GatedKey

    def __call__(self, rows: Passing, route: RouteTable) -> None:
        read = rows.x if self.key.tap == "input" else rows.own
        segments, gates = route.segments(self.stack.slices), route.segments(self.stack.gates)
        A, B, G = (self.stack.parts[part] for part in "ABG")
        rows.y = gated(read, rows.y, A, B, G, segments, gates, self.key.act, self.key.gate)


@dataclass(frozen=True, slots=True)
class AddNoisy:
    stack: Stack
    key: NoisyKey
    stream: int

    def __call__(self, rows: Passing, route: RouteTable) -> None:
        read = rows.x if self.key.tap == "input" else rows.own
        segments, gates = route.segments(self.stack.slices), route.segments(self.stack.gates)
        A, B, G = (self.stack.parts[part] for part in "ABG")
        rows.y = noisy(read, rows.y, A, B, G, segments, gates, route.dropout_keys, self.stream)


@dataclass(frozen=True, slots=True)
class AddSparse:
    values: Tensor
    index: SparseIndex
    slices: StackSlices

    def __call__(self, rows: Passing, route: RouteTable) -> None:
        rows.y = sparse(rows.x, rows.y, self.values, self.index, route.segments(self.slices))


@dataclass(frozen=True, slots=True)
class AddDelta:
    numbers: Tensor
    slices: StackSlices
    generators: Mapping[int, Generate]

    def __call__(self, rows: Passing, route: RouteTable) -> None:
        rows.y = delta(rows.x, rows.y, self.numbers, route.segments(self.slices), self.generators)


@dataclass(frozen=True, slots=True)
class RescaleRows:
    """DoRA's magnitudes over the norms of W's rows with the branch."""

    magnitudes: Tensor
    norms: Tensor
    slices: StackSlices

    def __call__(self, t: Tensor, route: RouteTable) -> Tensor:
        return affine(t, self.magnitudes / self.norms, None, route.segments(self.slices))


@dataclass(frozen=True, slots=True)
class ScaleAndShift:
    scale: Tensor | None
    shift: Tensor | None
    slices: StackSlices

    def __call__(self, t: Tensor, route: RouteTable) -> Tensor:
        return affine(t, self.scale, self.shift, route.segments(self.slices))


@dataclass(frozen=True, slots=True)
class Turn:
    stack: Stack
    rotation: Rotation

    def __call__(self, t: Tensor, route: RouteTable) -> Tensor:
        return rotate(t, self.stack.parts, self.rotation, route.segments(self.stack.slices))


@dataclass(frozen=True, slots=True)
class AddBias:
    bias: Tensor

    def __call__(self, t: Tensor, route: RouteTable) -> Tensor:
        return t + self.bias


def products(x: Tensor, linear: FrozenLinear, fused: FusedBranches, route: RouteTable) -> Sequence[Tensor]:
    """Of all projections of a linear; rows that enter at a layer have no grafts, and are always as many."""
    if route.entry is not None:
        return project_alone(x, linear)
    return project(x, linear, fused.routed(route.segments))


def step_of(key: OpKey, stack: Stack, site: Site, stacks: Stacks) -> Step:
    """The step of an op at a site."""
    return _STEPS[type(key)](key, stack, site, stacks)


def _add_branch(key: BranchKey, stack: Stack, site: Site, _: Stacks) -> Step:
    parts = stack.parts
    return AddBranch(parts["A"], parts["B"], parts.get("a"), key, stack.slices, stream(site, key))


def _add_delta(_: DeltaKey, stack: Stack, site: Site, stacks: Stacks) -> Step:
    return AddDelta(stack.parts["t"], stack.slices, stacks.generators[site])


def _rescale(_: NormKey, stack: Stack, *__: object) -> Step:
    return OnOutput(RescaleRows(stack.parts["m"], stack.parts["norm"], stack.slices))


def _affine(key: AffineKey, stack: Stack, *_: object) -> Step:
    change = ScaleAndShift(stack.parts.get("g"), stack.parts.get("b"), stack.slices)
    return OnInput(change) if key.side == "in" else OnOutput(change)


def _rotate(key: RotateKey, stack: Stack, *_: object) -> Step:
    change = Turn(stack, key.rotation)
    return OnInput(change) if key.side == "in" else OnOutput(change)


_STEPS: Mapping[type[OpKey], Callable[[Any, Stack, Site, Stacks], Step]] = {
    BranchKey: _add_branch,
    GatedKey: lambda key, stack, site, stacks: AddGated(stack, key),
    NoisyKey: lambda key, stack, site, stacks: AddNoisy(stack, key, stream(site, key)),
    SparseKey: lambda key, stack, site, stacks: AddSparse(
        stack.parts["w"], SparseIndex(stack.parts["i"]), stack.slices
    ),
    DeltaKey: _add_delta,
    NormKey: _rescale,
    AffineKey: _affine,
    RotateKey: _rotate,
}


def _rows(changing: Sequence[StackSlices], x: Tensor, route: RouteTable) -> Tensor:
    """[T, 1] bool: the rows of x under the slices' grafts."""
    mask = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
    for segment in (segment for slices in changing for segment in route.segments(slices)):
        mask[segment.start : segment.stop] = True
    return mask
