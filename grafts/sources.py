"""Grafts that another one is made over or starts from. What a spec takes of them is said by its starts, and by the hook
`from`: all tensors of a graft with the same slots. Torch-free but for the values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from polygraft.grafts.methods.registry import known_start
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.sizes import tensors
from polygraft.grafts.spec import Branch, GraftSpec, Slot, SpecError, source_names

if TYPE_CHECKING:
    from torch import Tensor

FROM = "from"


@dataclass(frozen=True, slots=True)
class Source:
    """A graft by its spec and its tensors."""

    spec: GraftSpec
    tensors: Mapping[str, Tensor]


def check(spec: GraftSpec, sources: Mapping[str, GraftSpec], shape: ModelShape) -> None:
    """Raise SpecError unless `sources`, by name, give what `spec` takes of them."""
    for name in spec.sources:
        if name not in sources:
            raise SpecError(f"of: graft {name!r} is not here")
    for name in _origins(spec):
        if [_same(slot) for slot in sources[name].slots] != [_same(slot) for slot in spec.slots]:
            raise SpecError(f"of: {name!r} is {sources[name].method!r}, from which no {spec.method!r} can start")
    for tensor in tensors(spec, shape):
        declared = known_start(tensor.start.name)
        if declared is not None and declared.check is not None:
            declared.check(tensor, spec, sources, shape, **tensor.start.keywords())


def continued(spec: GraftSpec, sources: Mapping[str, Source], shape: ModelShape) -> dict[str, Tensor]:
    """The tensors of the grafts that the spec goes on from, the mean of several; {} where it goes on from none.

    Raises SpecError for several that differ in a tensor that is not trained.
    """
    from polygraft.grafts.compose import soup

    members = [sources[name].tensors for name in _origins(spec)]
    return soup(tensors(spec, shape), members) if members else {}


def _origins(spec: GraftSpec) -> tuple[str, ...]:
    calls = (call for call in spec.hooks if call.name == FROM)
    return tuple(name for call in calls for name in source_names(str(call.keywords()["of"])))


def _same(slot: Slot) -> Slot:
    """The slot but for what decides only how it starts and is trained."""
    return replace(slot, start=None, dropout=0.0) if isinstance(slot, Branch) else replace(slot, start=None)
