"""Weight stacks: the tensors of all resident grafts, side by side for every site, in the layout and dtype that the
ops compute in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TypeVar, cast

import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.lowering import Lowered, no_layers
from polygraft.grafts.methods.declare import RunFromLayer
from polygraft.grafts.runtime.keys import OpKey, Phase, op_key
from polygraft.grafts.runtime.linears.protocol import FrozenLinear
from polygraft.grafts.runtime.row_norms import rescale
from polygraft.grafts.runtime.stack import OperandView, Stack, StackSlice, StackSlices
from polygraft.grafts.sites import Site
from polygraft.grafts.sizes import TensorSpec
from polygraft.grafts.spec import Branch, GraftSpec, Slot
from polygraft.kernels.copies.op import ready

T = TypeVar("T")
K = TypeVar("K")
_EMPTY: Mapping[OpKey, Stack] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Resident:
    """A graft whose tensors are to be computed with; `tensors` by the names of the graft's, usually float32.

    `draw` is the number that forms are redrawn with at the step ahead (`methods.declare.Lowering`), None when served.
    """

    id: str
    graft: BoundGraft
    tensors: Mapping[str, Tensor]
    draw: Callable[[], int | None] = lambda: None

    @property
    def spec(self) -> GraftSpec:
        return self.graft.spec

    def to(self, device: torch.device) -> Resident:
        """The same with its tensors on a device; those that are there already are the same ones."""
        return replace(self, tensors={name: value.to(device) for name, value in self.tensors.items()})


def weight(linears: Mapping[Site, tuple[FrozenLinear, int]], site: Site) -> Tensor:
    """W [out, in] of a projection, in float32 or wider."""
    linear, member = linears[site]
    weight = linear.weight().split_with_sizes(linear.widths)[member]
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


@dataclass(frozen=True)
class Stacks:
    """All stacks of a set of residents, by site; `views` by resident in the order of its graft's operands. `refresh`
    makes a resident's operands again after its tensors changed. What is compiled of them, plans above all, is kept here
    and dies with them.

    Matrices and prefix rows are in the backbone's dtype, operands of `wide` keys in float32 or wider, indices are
    integers.
    """

    residents: tuple[Resident, ...]
    lowered: tuple[Lowered, ...]
    at: Mapping[Site, Mapping[OpKey, Stack]]
    views: tuple[tuple[OperandView, ...], ...]
    linears: Mapping[Site, tuple[FrozenLinear, int]]
    trainable: bool = False
    _derived: dict[Hashable, object] = field(default_factory=dict)
    _copies: dict[int, Callable[[], object]] = field(default_factory=dict)

    @staticmethod
    def of(
        residents: Sequence[Resident],
        dtype: torch.dtype,
        linears: Mapping[Site, tuple[FrozenLinear, int]],
        run_from_layer: RunFromLayer = no_layers,
        *,
        device: torch.device,
        trainable: bool = False,
    ) -> Stacks:
        """Stacks holding `residents` in order, all on a device; with `trainable` each stack with a trained operand is
        a leaf that collects a gradient. `run_from_layer` runs the rows of forms through the backbone's layers."""
        residents = [resident.to(device) for resident in residents]
        lowered = tuple(Lowered(r.graft, lambda site: weight(linears, site), run_from_layer) for r in residents)
        at, views = build(list(zip(residents, lowered, strict=True)), dtype, device)
        stacks = Stacks(tuple(residents), lowered, at, views, linears, trainable)
        for index in range(len(residents)):
            stacks.refresh(index)
        if trainable:
            for made, own in zip(lowered, views, strict=True):
                for view in own:
                    if view.stack.is_floating_point() and made.trained(view.tensor):
                        view.stack.requires_grad_()
        return stacks

    def get(self, site: Site) -> Mapping[OpKey, Stack]:
        """The stacks at a site in the order in which they act, empty when no graft acts there."""
        return self.at.get(site, _EMPTY)

    def of_kind(self, site: Site, kind: type[K]) -> tuple[tuple[K, Stack], ...]:
        """The stacks at a site whose keys are of a kind, in the order in which they act."""
        own = self.get(site).items()
        return self.derived((kind, site), lambda: tuple((key, stack) for key, stack in own if isinstance(key, kind)))

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when `key` was asked for first; keys begin with the function or class they belong to."""
        if key not in self._derived:
            self._derived[key] = make()
        return cast(T, self._derived[key])

    def forget_derived(self) -> None:
        """Drop what was compiled, whose packed copies of weights are outside any budget."""
        self._derived.clear()

    @cached_property
    def generators(self) -> Mapping[Site, Mapping[int, Callable[[Tensor], Tensor]]]:
        """What makes the dense matrices of the deltas at a site, by their first row in the stack."""
        by_row: dict[Site, dict[int, Callable[[Tensor], Tensor]]] = defaultdict(dict)
        for resident, made, own in zip(self.residents, self.lowered, self.views, strict=True):
            for view in own:
                slot, site = view.tensor.slot, view.tensor.site
                if view.tensor.part == "t" and site is not None:
                    by_row[site][view.first] = made.generator(slot, site, resident.tensors, resident.draw)
        return by_row

    def refresh(self, graft: int) -> None:
        """Make a resident's operands in the stacks, and recompute what depends on them (DoRA's norms)."""
        with torch.no_grad():
            self._copied(graft)()
            for view in self.views[graft]:
                if view.tensor.part == "m" and view.tensor.site is not None:
                    rescale(self.at[view.tensor.site], *self.linears[view.tensor.site], graft)

    def _copied(self, graft: int) -> Callable[[], object]:
        """Copies the operands to their rows of the stacks; kept where they are the resident's own tensors."""
        if graft in self._copies:
            return self._copies[graft]
        resident, made, views = self.residents[graft], self.lowered[graft], self.views[graft]
        source = made.make(resident.tensors, resident.draw())
        rows = [view.rows() for view in views]
        operands = [source[view.tensor.name].reshape(row.shape) for view, row in zip(views, rows, strict=True)]
        copies = ready(rows, operands)
        if made.same:
            self._copies[graft] = copies
        return copies

    def gradient(self, graft: int, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradient of a resident's trained tensors, in their order, from that of its operands."""
        resident, made = self.residents[graft], self.lowered[graft]
        return gradients if made.same else made.pull(resident.tensors, gradients, resident.draw())

    def gradients(self) -> list[list[Tensor | None]]:
        """What a backward left for every resident's operands: flat ones in the order of its views, None where it
        never came."""
        gradients: list[list[Tensor | None]] = [[None] * len(own) for own in self.views]
        for stack, shares in self._shares:
            if stack.grad is not None:
                flat = stack.grad.view(-1).split_with_sizes([size for _, _, size in shares])
                for (graft, position, _), own in zip(shares, flat, strict=True):
                    gradients[graft][position] = own
        return gradients

    @cached_property
    def _shares(self) -> list[tuple[Tensor, list[tuple[int, int, int]]]]:
        """Of each stack tensor, in row order: (resident, position among its views, elements)."""
        by_stack: dict[Hashable, tuple[Tensor, list[tuple[int, int, int]]]] = {}
        for graft, own in enumerate(self.views):  # residents lie in the stacks in their order
            for position, view in enumerate(own):
                key = op_key(self.residents[graft].spec.slots[view.tensor.slot])
                shared = by_stack.setdefault((view.tensor.site, key, view.tensor.part), (view.stack, []))
                shared[1].append((graft, position, view.tensor.numel))
        return list(by_stack.values())

    def leaves(self) -> Iterator[Tensor]:
        """Every distinct stack tensor that a gradient is collected in."""
        for kinds in self.at.values():
            for stack in kinds.values():
                for part, tensor in stack.parts.items():
                    if part != "norm":
                        yield tensor


def build(
    residents: Sequence[tuple[Resident, Lowered]], dtype: torch.dtype, device: torch.device
) -> tuple[Mapping[Site, Mapping[OpKey, Stack]], tuple[tuple[OperandView, ...], ...]]:
    """Empty stacks for the operands of all residents, and where each operand lies."""
    places: dict[Site, dict[OpKey, dict[str, list[tuple[int, TensorSpec, Slot]]]]] = defaultdict(dict)
    for index, (resident, lowered) in enumerate(residents):
        for tensor in lowered.operands:
            assert tensor.site is not None
            slot = resident.spec.slots[tensor.slot]
            parts = places[tensor.site].setdefault(op_key(slot), {})
            parts.setdefault(tensor.part, []).append((index, tensor, slot))
    wide = torch.promote_types(dtype, torch.float32)
    views: list[list[OperandView]] = [[] for _ in residents]
    at: dict[Site, dict[OpKey, Stack]] = defaultdict(dict)
    for site, keys in places.items():
        for key in sorted(keys, key=lambda key: (key.phase, key.rank)):
            built: dict[str, Tensor] = {}
            placed: dict[str, StackSlices] = {}
            for part, members in keys[key].items():
                heights = [tensor.shape[0] if len(tensor.shape) == 2 else 1 for _, tensor, _ in members]
                kept = torch.int64 if part == "i" else wide if key.wide else dtype
                stack = torch.empty(sum(heights), members[0][1].shape[-1], dtype=kept, device=device)
                built[part], first = stack, 0
                slices: list[StackSlice] = []
                for (index, tensor, slot), height in zip(members, heights, strict=True):
                    resident, lowered = residents[index]
                    views[index].append(OperandView(tensor, stack, first, first + height))
                    says = (slot.scale, slot.dropout, (slot.first, slot.last)) if isinstance(slot, Branch) else ()
                    absent = lowered.absence(tensor.slot, site.layer, resident.draw)
                    slices.append(StackSlice(index, first, first + height, *says)._replace(absent=absent))
                    first += height
                placed[part] = StackSlices(tuple(slices))
            if key.phase is Phase.NORM:
                built["norm"] = torch.ones_like(built["m"])
            at[site][key] = Stack(key, next(iter(placed.values())), built, placed.get("G", StackSlices()))
    for (_, lowered), own in zip(residents, views, strict=True):
        order = {tensor.name: i for i, tensor in enumerate(lowered.operands)}
        own.sort(key=lambda view: order[view.tensor.name])
    return at, tuple(map(tuple, views))
