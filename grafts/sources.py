"""Grafts that another one is made over or starts from. What a spec takes of them is said by its starts, and by the hook
`from`: all tensors of a graft with the same slots. Torch-free but for the values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.elastic import cut, elastic
from polygraft.grafts.methods.registry import known_start
from polygraft.grafts.sizes import HEAD
from polygraft.grafts.spec import Branch, GraftSpec, Slot, SpecError, source_names

if TYPE_CHECKING:
    from torch import Tensor

FROM = "from"


@dataclass(frozen=True, slots=True)
class Source:
    """A graft and its tensors."""

    graft: BoundGraft
    tensors: Mapping[str, Tensor]


def check(graft: BoundGraft, sources: Mapping[str, BoundGraft]) -> None:
    """Raise SpecError unless `sources`, by name, give what the graft takes of them."""
    spec = graft.spec
    for name in spec.sources:
        if name not in sources:
            raise SpecError(f"of: graft {name!r} is not here")
    for name in _origins(spec):
        source = sources[name]
        if elastic(source.spec) is not None:
            cut(graft, source)
        elif [_same(slot) for slot in source.spec.slots] != [_same(slot) for slot in spec.slots]:
            raise SpecError(f"of: {name!r} is {source.spec.method!r}, from which no {spec.method!r} can start")
    for tensor in graft.tensors:
        declared = known_start(tensor.start.name)
        if declared is not None and declared.check is not None:
            declared.check(tensor, graft, sources, **tensor.start.keywords())


def continued(graft: BoundGraft, sources: Mapping[str, Source]) -> dict[str, Tensor]:
    """The tensors of the grafts that the graft goes on from, the mean of several, the first rows of a supernet's, but
    for its head; {} where it goes on from none.

    Raises SpecError for several that differ in a tensor that is not trained.
    """
    from polygraft.grafts.compose import soup

    members = [_taken(graft, sources[name]) for name in _origins(graft.spec)]
    return soup([tensor for tensor in graft.tensors if tensor.slot != HEAD], members) if members else {}


def _taken(graft: BoundGraft, source: Source) -> Mapping[str, Tensor]:
    if elastic(source.graft.spec) is None:
        return source.tensors
    names = cut(graft, source.graft)
    return {t.name: source.tensors[names[t.name]][: t.shape[0]] for t in graft.tensors if t.name in names}


def _origins(spec: GraftSpec) -> tuple[str, ...]:
    calls = (call for call in spec.hooks if call.name == FROM)
    return tuple(name for call in calls for name in source_names(str(call.keywords()["of"])))


def _same(slot: Slot) -> Slot:
    """The slot but for what decides only how it starts and is trained."""
    return replace(slot, start=None, dropout=0.0) if isinstance(slot, Branch) else replace(slot, start=None)
