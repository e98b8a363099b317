"""Which branches are computed together with the projections of a fused linear, and which rows pass them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polygraft.grafts.runtime.keys import AffineKey, BranchKey, OpKey, RotateKey
from polygraft.grafts.runtime.linears.products import add_multiplied, multiply, pack
from polygraft.grafts.runtime.stack import Stack, StackSlice, StackSlices
from polygraft.kernels.branch.activation import ACTIVATIONS
from polygraft.kernels.common.segments import Segments
from polygraft.kernels.dense.op import FusedBranch, Work

SegmentsOf = Callable[[StackSlices], Segments]
Unfused = dict[BranchKey, StackSlices]


@dataclass(frozen=True, slots=True)
class StackedBranches:
    """All branches of one activation of a fused linear as two frozen products: A [R, in], the members' ranks one after
    the other, and B^T [out, R], every member's in its own rows and columns and 0 elsewhere; `slices` are ranks of A."""

    A: Tensor
    B: Tensor
    slices: StackSlices
    act: str

    @staticmethod
    def of(branches: Sequence[tuple[FusedBranch, StackSlices]], widths: Sequence[int]) -> StackedBranches:
        """Packed copies of the branches' weights."""
        first_branch = branches[0][0]
        B = first_branch.B.new_zeros(sum(widths), sum(len(b.A) for b, _ in branches))
        slices: list[StackSlice] = []
        first = 0
        for b, own in branches:
            low = sum(widths[: b.member])
            B[low : low + widths[b.member], first : first + len(b.A)] = b.B.T
            slices += [one._replace(first=one.first + first, last=one.last + first) for one in own]
            first += len(b.A)
        A = torch.cat([b.A for b, _ in branches])
        return StackedBranches(pack(A), pack(B), StackSlices(tuple(slices)), first_branch.act)

    def add(self, y_TO: Tensor, x_TI: Tensor, segments: Segments) -> Tensor:
        """y plus the branches; products with foreign ranks are selected out, so the weights must be finite."""
        hidden = ACTIVATIONS[self.act](multiply(x_TI, self.A))
        factor, foreign = segments.scales_TR(len(hidden), hidden.shape[1], hidden)
        return add_multiplied(y_TO, (hidden * factor).masked_fill_(foreign, 0).to(y_TO.dtype), self.B)


@dataclass(frozen=True, slots=True)
class FusedBranches:
    """The branches of one fused linear, each with its slices, and what serving has stacked of them, by activation."""

    items: tuple[tuple[FusedBranch, StackSlices], ...] = ()
    _stacked: dict[str, StackedBranches] = field(default_factory=dict)

    def stacked(self, act: str, widths: Sequence[int]) -> StackedBranches:
        """The branches of an activation as two products; their weights are copied the first time."""
        if act not in self._stacked:
            self._stacked[act] = StackedBranches.of([item for item in self.items if item[0].act == act], widths)
        return self._stacked[act]

    def routed(self, segments: SegmentsOf) -> RoutedBranches:
        """With the rows of one forward, whose work lists `segments` gives."""
        listed = ((branch, segments(slices)) for branch, slices in self.items)
        return RoutedBranches(self, segments, tuple(pair for pair in listed if pair[1].runs))


@dataclass(frozen=True, slots=True)
class RoutedBranches:
    """Fused branches in one forward; `work` are those that rows pass through."""

    branches: FusedBranches
    segments: SegmentsOf
    work: Work

    @property
    def trained(self) -> bool:
        return any(b.A.requires_grad or b.B.requires_grad for b, _ in self.work)

    def ranks(self, act: str) -> int:
        """Of all grafts, whether they have rows here or not."""
        return sum(len(b.A) for b, _ in self.branches.items if b.act == act)

    def stacked(self, act: str, widths: Sequence[int]) -> tuple[StackedBranches, Segments]:
        stacked = self.branches.stacked(act, widths)
        return stacked, self.segments(stacked.slices)


NONE = FusedBranches().routed(lambda _: Segments(()))


def fused_branches(members: Sequence[Mapping[OpKey, Stack]], *, dropping: bool) -> tuple[FusedBranches, list[Unfused]]:
    """The branches of all members of a fused linear that are computed with it, and of each member the slices that are
    not, by key: those with a hidden bias, and those that do not read the projections' input as it is, by dropout, or by
    their graft's change of an input that others share."""
    items: list[tuple[FusedBranch, StackSlices]] = []
    left: list[Unfused] = []
    for member, stacks in enumerate(members):
        changed = _changed(stacks) if len(members) > 1 else frozenset()
        own: Unfused = {}
        for key, stack in _branches(stacks):
            unfused = [one for one in stack.slices if key.bias or one.graft in changed or (dropping and one.dropout)]
            own[key] = StackSlices(tuple(unfused))
            if fused := stack.slices.without(unfused):
                items.append((FusedBranch(member, stack.parts["A"], stack.parts["B"], key.act), fused))
        left.append(own)
    return FusedBranches(tuple(items)), left


def _changed(stacks: Mapping[OpKey, Stack]) -> frozenset[int]:
    """Grafts that change what a projection reads."""
    sides = ((stack, key.side) for key, stack in stacks.items() if isinstance(key, AffineKey | RotateKey))
    return frozenset(graft for stack, side in sides if side == "in" for graft in stack.slices.grafts)


def _branches(stacks: Mapping[OpKey, Stack]) -> list[tuple[BranchKey, Stack]]:
    """Those without a gate that read their site's input."""
    return [(key, stack) for key, stack in stacks.items() if isinstance(key, BranchKey) and key.tap == "input"]
