"""From a graft's tensors to the operands of its ops, and back from their gradients.

Most slots compute with their tensors as they are. A slot with a form has other tensors: its operands are a
differentiable function of them, evaluated for one graft alone, so that nothing else in a batch has to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NoReturn

import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.methods.declare import IntegerGrid, Lowering, RunFromLayer, SiteShape
from polygraft.grafts.methods.registry import form
from polygraft.grafts.sites import Site
from polygraft.grafts.sizes import HEAD, TensorSpec
from polygraft.grafts.spec import Delta, SpecError

Values = Mapping[str, Tensor]
Draw = Callable[[], int | None]


def no_layers(rows: Tensor, first: int) -> NoReturn:
    """`Lowering.run_from_layer` where there is no backbone."""
    raise SpecError("form: its operands are what a backbone's layers make of rows; name a backbone")


@dataclass(frozen=True, slots=True)
class Absence:
    """Whether no row passes an op at a layer at the draw of the moment (`Parametrization.absent`)."""

    layer: int
    draw: Draw
    asks: Callable[..., bool]
    arguments: tuple[tuple[str, int | float | str], ...]

    def __call__(self) -> bool:
        return self.asks(self.layer, self.draw(), **dict(self.arguments))


class Lowered:
    """One graft's operands by name. `weight` gives the frozen W [out, in] of a site, `run_from_layer` what rows
    leave in the frozen layers (`methods.declare.Lowering`)."""

    def __init__(
        self, graft: BoundGraft, weight: Callable[[Site], Tensor], run_from_layer: RunFromLayer = no_layers
    ) -> None:
        self.spec, self._weight, self._run_from_layer = graft.spec, weight, run_from_layer
        self.operands = graft.operands
        self.tensors = tuple(tensor for tensor in graft.tensors if tensor.slot != HEAD)  # no op computes with the head
        self._sites: list[tuple[int, Site, SiteShape]] = [
            (index, site, place)
            for index, places in graft.places.items()
            for site, place in places.items()
            if graft.spec.slots[index].form is not None
        ]

    @property
    def same(self) -> bool:
        """Whether the operands are the trained tensors themselves, in the same order."""
        return not self._sites and all(tensor.trained for tensor in self.tensors)

    def trained(self, operand: TensorSpec) -> bool:
        """Whether an operand is made of a tensor that is trained."""
        declared = self.spec.slots[operand.slot].form
        assert operand.site is not None
        read = self._read(operand.slot, operand.site)
        if declared is None or operand.part in form(declared.name).kept:
            read = [tensor for tensor in read if tensor.part == operand.part]
        return any(tensor.trained for tensor in read)

    def absence(self, index: int, layer: int, draw: Draw) -> Absence | None:
        """When no row passes a slot's op at a layer; None where all do at every draw."""
        declared = self.spec.slots[index].form
        if declared is None or (asks := form(declared.name).absent) is None:
            return None
        return Absence(layer, draw, asks, declared.arguments)

    def make(self, values: Values, draw: int | None = None) -> dict[str, Tensor]:
        """Operands in order; differentiable in `values`."""
        found, run_from_layer = dict(values), cache(self._run_from_layer)
        for index, site, place in self._sites:
            slot = self.spec.slots[index]
            assert slot.form is not None
            read = self._read(index, site)
            if isinstance(slot, Delta):
                columns = [values[tensor.name].reshape(-1, 1) for tensor in _generating(read)]
                made: Mapping[str, Tensor] = {"t": torch.cat(columns)}
            else:
                lowering = Lowering(place, self._weights_in_layer(site), run_from_layer, draw)
                made = form(slot.form.name).operands(
                    slot, {tensor.part: values[tensor.name] for tensor in read}, lowering, **slot.form.keywords()
                )
            found |= {f"{index}.{site}.{part}": value for part, value in made.items()}
        return {operand.name: found[operand.name] for operand in self.operands}

    def generator(
        self, index: int, site: Site, values: Values, draw: Draw = lambda: None
    ) -> Callable[[Tensor], Tensor]:
        """The dense W of a delta slot at a site as a function of its operand; what is not in the operand is read from
        `values` where it lies."""
        slot = self.spec.slots[index]
        assert slot.form is not None
        declared, arguments, weight = form(slot.form.name), slot.form.keywords(), self._weights_in_layer(site)
        place = next(place for i, s, place in self._sites if (i, s) == (index, site))
        read = self._read(index, site)
        moving = _generating(read)
        fixed = {tensor.part: values[tensor.name] for tensor in read if tensor not in moving}

        def generate(flat: Tensor) -> Tensor:
            pieces = flat.reshape(-1).split_with_sizes([tensor.numel for tensor in moving])
            parts = {tensor.part: piece.view(tensor.shape) for tensor, piece in zip(moving, pieces, strict=True)}
            lowering = Lowering(place, weight, self._run_from_layer, draw())
            return declared.operands(slot, fixed | parts, lowering, **arguments)["W"]

        return generate

    def grid(self, index: int, site: Site, values: Values, like: Tensor) -> IntegerGrid | None:
        """The integers that W lies on under a slot at a site, in the dtype of `like`; None where it is on no grid."""
        slot = self.spec.slots[index]
        if slot.form is None or (made := form(slot.form.name).grid) is None:
            return None
        place = next(place for i, s, place in self._sites if (i, s) == (index, site))
        lowering = Lowering(place, self._weights_in_layer(site), self._run_from_layer)
        parts = {tensor.part: values[tensor.name].to(like) for tensor in self._read(index, site)}
        return made(slot, parts, lowering, **slot.form.keywords())

    def _weights_in_layer(self, site: Site) -> Callable[..., Tensor]:
        """W of `site`, or of another site in its layer by name."""
        return lambda name=site.name: self._weight(Site(site.layer, name))

    def pull(self, values: Values, gradients: Sequence[Tensor | None], draw: int | None = None) -> list[Tensor | None]:
        """Gradients of the trained tensors, in their order, from flat ones of the operands in theirs."""
        leaves = {t.name: values[t.name].detach().requires_grad_() for t in self.tensors if t.trained}
        with torch.enable_grad():
            made = self.make({**values, **leaves}, draw)
        reached = [(made[o.name], g) for o, g in zip(self.operands, gradients, strict=True) if g is not None]
        reached = [(operand, gradient) for operand, gradient in reached if operand.requires_grad]
        if not reached:
            return [None] * len(leaves)
        # Copied, so that where a gradient lay among those of other grafts cannot decide how a product of it is rounded.
        slopes = [gradient.view(operand.shape).to(operand.dtype, copy=True) for operand, gradient in reached]
        found = torch.autograd.grad([operand for operand, _ in reached], [*leaves.values()], slopes, allow_unused=True)
        return [None if gradient is None else gradient.reshape(-1) for gradient in found]

    def _read(self, index: int, site: Site) -> list[TensorSpec]:
        """The tensors that the form of a slot reads at a site, the shared ones first."""
        return [*self._of_slot.get((index, None), ()), *self._of_slot.get((index, site), ())]

    @cached_property
    def _of_slot(self) -> Mapping[tuple[int, Site | None], list[TensorSpec]]:
        """By slot and site; no site: those that all of its sites share."""
        found: dict[tuple[int, Site | None], list[TensorSpec]] = {}
        for tensor in self.tensors:
            found.setdefault((tensor.slot, tensor.site), []).append(tensor)
        return found


def lower(
    graft: BoundGraft, values: Values, weight: Callable[[Site], Tensor], run_from_layer: RunFromLayer = no_layers
) -> tuple[BoundGraft, dict[str, Tensor]]:
    """The graft as it is served (`BoundGraft.plain`): its operands are its tensors."""
    plain = graft.plain
    pairs = enumerate(zip(graft.spec.slots, plain.spec.slots, strict=True))
    made = [index for index, (slot, served) in pairs if slot.form is not None and served.form is None]
    with torch.no_grad():
        operands = Lowered(graft, weight, run_from_layer).make(values) if made else {}
    return plain, {t.name: (operands if t.slot in made else values)[t.name] for t in plain.tensors}


def _generating(read: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
    """What the operand of a delta is made of (`sizes.operands`): the trained ones, all if none is."""
    return [tensor for tensor in read if tensor.trained] or read
