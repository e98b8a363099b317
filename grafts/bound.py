"""A graft on a backbone's shape: where it acts, its tensors and operands, and how many numbers they are, derived once.
Torch-free.

A description is parsed and bound to a shape at an edge; behind it a graft is bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from polygraft.grafts.methods.declare import SiteShape
from polygraft.grafts.methods.registry import form
from polygraft.grafts.sites import ModelShape, Site, sites_of
from polygraft.grafts.sizes import HEAD, TensorSpec, head_tensors, operands_of, tensors_of
from polygraft.grafts.spec import GraftSpec, Layers, SpecError


@dataclass(frozen=True)
class BoundGraft:
    """What `spec` means on backbones of this `shape`; raises SpecError where it means nothing there."""

    spec: GraftSpec
    shape: ModelShape

    def __post_init__(self) -> None:
        _ = self.tensors

    @cached_property
    def sites(self) -> tuple[tuple[int, Site], ...]:
        """(slot index, site) of every place the graft acts, slot-major."""
        return sites_of(self.spec, self.shape)

    @cached_property
    def places(self) -> Mapping[int, Mapping[Site, SiteShape]]:
        """The same sites with their widths, by slot index."""
        for slot in self.spec.slots:
            if slot.form is not None and form(slot.form.name).runs_layers and not self.shape.causal:
                says = f"{self.shape.sees}; rows that enter at a layer would read the input there"
                raise SpecError(f"{slot.form.name}: {says}")
        found: dict[int, dict[Site, SiteShape]] = {}
        for index, site in self.sites:
            places = found.setdefault(index, {})
            places[site] = SiteShape(site.layer, site.name, *self.shape.dims(site.name), index=len(places))
        return found

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """What is trained, saved and moved, in file and slab order: slot by slot, what its sites share first; then the
        head's."""
        slots, head = self.spec.slots, self.spec.head
        own = [one for index, places in self.places.items() for one in tensors_of(index, slots[index], places)]
        if head is not None and head.kind != self.shape.head_kind:
            raise SpecError(f"head: {self.shape.arch} takes {self.shape.head_kind or 'none'}, not {head.kind!r}")
        return (*own, *(head_tensors(head, self.shape.hidden) if head else ()))

    @cached_property
    def head(self) -> tuple[TensorSpec, ...]:
        """The classifier's tensors among them; none where there is none."""
        return tuple(tensor for tensor in self.tensors if tensor.slot == HEAD)

    @cached_property
    def operands(self) -> tuple[TensorSpec, ...]:
        """What the ops compute with, in the order of slots and sites."""
        slots = self.spec.slots
        return tuple(one for index, places in self.places.items() for one in operands_of(index, slots[index], places))

    @cached_property
    def trained(self) -> tuple[TensorSpec, ...]:
        """The tensors that are trained, in the order of the slab."""
        return tuple(tensor for tensor in self.tensors if tensor.trained)

    @cached_property
    def parameters(self) -> int:
        """Trainable parameters."""
        return sum(tensor.numel for tensor in self.trained)

    @cached_property
    def frozen(self) -> int:
        """Elements of the tensors that stay as they started."""
        return sum(tensor.numel for tensor in self.tensors if not tensor.trained)

    @cached_property
    def plain(self) -> BoundGraft:
        """As it is served (`GraftSpec.plain`), with nothing at the layers where no row passes then."""
        spec, slots = self.spec.plain, list(self.spec.plain.slots)
        for index, slot in enumerate(self.spec.slots):
            asks = None if slot.form is None else form(slot.form.name).absent
            if slot.form is not None and asks is not None:
                layers = sorted({site.layer for i, site in self.sites if i == index})
                present = tuple(layer for layer in layers if not asks(layer, None, **slot.form.keywords()))
                slots[index] = replace(slots[index], layers=present)
        return BoundGraft(replace(spec, slots=tuple(slots)), self.shape)

    @cached_property
    def prefix_length(self) -> int:
        """Rows in the cache before a sequence, whose positions start here (as in PEFT)."""
        return self.spec.prefix_length

    @cached_property
    def prefix_layers(self) -> Layers:
        """The layers that have prefix rows, None for all; in the others the virtual tokens are not seen."""
        return self.spec.prefix_layers

    @cached_property
    def virtual_length(self) -> int:
        """Virtual tokens that are rows of the sequence, after the prefix and before the prompt."""
        return self.spec.virtual_length

    @cached_property
    def context_length(self) -> int:
        """Positions before the prompt's first token."""
        return self.spec.context_length

    @cached_property
    def reads_prompt(self) -> bool:
        """Whether its virtual tokens are a function of the whole prompt (`GraftSpec.reads_prompt`)."""
        return self.spec.reads_prompt

    @cached_property
    def prefix_cacheable(self) -> bool:
        """Whether sequences that begin alike have the same keys and values there (`GraftSpec.prefix_cacheable`)."""
        return self.spec.prefix_cacheable

    @cached_property
    def reads_ahead(self) -> bool:
        """Whether what a row is may depend on tokens after it, by the graft or by the backbone."""
        return not self.prefix_cacheable or not self.shape.causal

    @cached_property
    def draws(self) -> bool:
        """Whether a forward in training depends on random numbers."""
        return self.spec.draws
