"""Which grafts a replica holds in memory, within a byte budget, and the weight stacks that its batches use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from polygraft.cluster.model import GraftId
from polygraft.grafts.formats import native
from polygraft.grafts.lowering import lower
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.grafts.sizes import HEAD
from polygraft.grafts.spec import Branch


class GraftUnusable(Exception):
    """A graft that this replica cannot serve: missing, for another backbone, damaged, not finite, or too large."""


@dataclass(frozen=True, slots=True)
class Composition:
    """Stacks of a set of grafts, and each graft's place among their residents."""

    stacks: Stacks
    place: Mapping[GraftId, int]


class Residency:
    """Grafts by least recent use. `fetch` may run in any thread, all else in the engine's.

    The budget holds the grafts' own tensors; the stacks at hand may take as much again (the one in use even more).
    """

    def __init__(self, *, folder: Path, backbone: Backbone, budget_bytes: int) -> None:
        self._folder = folder
        self._backbone = backbone
        self._budget = budget_bytes
        self._held: OrderedDict[GraftId, Resident] = OrderedDict()
        self._sizes: dict[GraftId, int] = {}
        self._pins: dict[GraftId, int] = {}
        self.evictions = 0  # grafts that went for others
        self._compositions: OrderedDict[tuple[GraftId, ...], Composition] = OrderedDict()

    @property
    def held(self) -> tuple[GraftId, ...]:
        return tuple(sorted(self._held))

    @property
    def used_bytes(self) -> int:
        return sum(self._sizes[graft] for graft in self._held)

    def fetch(self, graft: GraftId) -> Resident:
        """Read a graft from the artefact folder and move it to the backbone's device. Raises GraftUnusable, also for
        values that are not finite as they are computed with, since products with foreign ranks may be selected out only
        after the first of two."""
        try:
            stored = native.load(self._folder / graft, shape=self._backbone.shape, backbone=self._backbone.fingerprint)
        except (OSError, ValueError) as error:
            raise GraftUnusable(f"graft {graft} cannot be served: {error}") from error
        if stored.id != graft:
            raise GraftUnusable(f"graft {graft} cannot be served: its folder holds {stored.id}")
        backbone = self._backbone
        held = {name: value.to(backbone.device) for name, value in stored.tensors.items()}
        served, values = lower(stored.graft, held, backbone.weight, backbone.run_from_layer)
        for tensor in served.tensors:
            slot = None if tensor.slot == HEAD else served.spec.slots[tensor.slot]
            scale = slot.scale if isinstance(slot, Branch) else 1.0
            if not bool((values[tensor.name].to(self._backbone.dtype) * scale).isfinite().all().cpu()):
                raise GraftUnusable(
                    f"graft {graft} cannot be served: {tensor.name} times {scale:g} is not finite in "
                    f"{self._backbone.dtype}"
                )
        return Resident(graft, served, values)

    def get(self, graft: GraftId) -> Resident | None:
        return self._held.get(graft)

    def can_admit(self, resident: Resident, keep: Collection[GraftId]) -> bool:
        """Whether it fits with the grafts in use and to keep. Raises GraftUnusable if it would not fit alone."""
        if _size(resident) > self._budget:
            raise GraftUnusable(
                f"graft {resident.id}: needs {_size(resident)} bytes; the replica has {self._budget} for grafts"
            )
        pinned = sum(self._sizes[graft] for graft in self._held if graft in self._pins or graft in keep)
        return pinned + _size(resident) <= self._budget

    def admit(self, resident: Resident, keep: Collection[GraftId]) -> None:
        """Hold it; the least recently used grafts that nobody needs go for it. Ask `can_admit` first."""
        room = self._budget - _size(resident)
        for graft in [graft for graft in self._held if graft not in self._pins and graft not in keep]:
            if self.used_bytes <= room:
                break
            self._drop(graft)
            self.evictions += 1
        assert self.used_bytes <= room, "admitted a graft that does not fit"
        self._held[GraftId(resident.id)] = resident
        self._sizes[GraftId(resident.id)] = _size(resident)

    def pin(self, graft: GraftId) -> None:
        """One more sequence uses it; it stays until as many `unpin`."""
        self._pins[graft] = self._pins.get(graft, 0) + 1
        self._held.move_to_end(graft)

    def unpin(self, graft: GraftId) -> None:
        self._pins[graft] -= 1
        if not self._pins[graft]:
            del self._pins[graft]

    def compose(self, grafts: Collection[GraftId]) -> Composition:
        """Stacks that hold all of `grafts`.

        The order of residents is that of their ids. A composition at hand is used while at most half of it is idle, so
        that streams that finish one after the other rebuild only each time their number halves.
        """
        wanted = frozenset(grafts)
        fitting = [key for key in self._compositions if wanted.issubset(key) and len(key) <= max(1, 2 * len(wanted))]
        key = min(fitting, key=lambda key: (len(key), key)) if fitting else tuple(sorted(wanted))
        if self._compositions and (front := next(reversed(self._compositions))) != key:
            self._compositions[front].stacks.forget_derived()  # its packed copies are outside the budget
        if key not in self._compositions:
            stacks = self._backbone.stacks([self._held[graft] for graft in key])
            self._compositions[key] = Composition(stacks, {graft: place for place, graft in enumerate(key)})
        self._compositions.move_to_end(key)
        while len(self._compositions) > 1 and self._stacked_bytes() > self._budget:
            self._compositions.popitem(last=False)
        return self._compositions[key]

    def _stacked_bytes(self) -> int:
        return sum(self._sizes[graft] for key in self._compositions for graft in key)

    def _drop(self, graft: GraftId) -> None:
        del self._held[graft], self._sizes[graft]
        for key in [key for key in self._compositions if graft in key]:
            del self._compositions[key]


def _size(resident: Resident) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in resident.tensors.values())
