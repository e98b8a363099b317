"""What a PEFT config trains of the backbone's own numbers, and as which op's tensors we have that: one table for both
ways (`peft_extras.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.peft_keys import ROOT
from polygraft.grafts.formats.peft_modules import candidates, path
from polygraft.grafts.grammar import Term, union
from polygraft.grafts.sites import NORMS, Site
from polygraft.grafts.spec import Layers, Slot

if TYPE_CHECKING:
    from torch import Tensor

Values = Mapping[str, "Tensor"]


@dataclass(frozen=True, slots=True)
class Change:
    """What one method's slot does at a site: `read` gives its tensors from the backbone's own numbers and those that
    PEFT keeps in their place, by `weight` and `bias`, `write` these from the op's. A norm's weight is its factor.
    `arguments` are the method's that are not at their defaults."""

    method: str
    read: Callable[[Values, Values], Values]
    write: Callable[[Values, Values], Values]
    arguments: tuple[tuple[str, str], ...] = ()

    def at(self, names: Iterable[str], layers: Layers) -> Term:
        """The term that makes the change at these sites."""
        return Term(self.method, {**dict(self.arguments), "at": "|".join(names)}, layers)

    def is_of(self, slot: Slot) -> bool:
        """Whether the slot is the method's, wherever it stands."""
        own = _slot_of(self.method)
        return replace(slot, at=own.at, layers=None) == own


@cache
def _slot_of(method: str) -> Slot:
    """A method's one slot as its defaults have it; asked for once a site of every folder."""
    (own,) = union([Term(method, {})]).slots
    return own


def _scale_and_shift(own: Values, kept: Values) -> Values:
    g = kept["weight"] / own["weight"]
    return {"g": g, "b": kept["bias"] - g * own["bias"]}


# Child-tuning that keeps the whole gradient trains all of dW.
DENSE = Change(
    "child-tuning",
    lambda own, kept: {"child": kept["weight"] - own["weight"], "child_dice": kept["weight"].new_zeros(2)},
    lambda own, ours: {"weight": own["weight"] + ours["child"]},
    (("p", "1"),),
)
SHIFT = Change(
    "bitfit",
    lambda own, kept: {"b": kept["bias"] - own["bias"]},
    lambda own, ours: {"bias": own["bias"] + ours["b"]},
)
SCALE = Change(
    "ln-tuning",
    lambda own, kept: {"g": kept["weight"] / own["weight"]},
    lambda own, ours: {"weight": ours["g"] * own["weight"]},
)
SCALE_AND_SHIFT = Change(
    "ssf",
    _scale_and_shift,
    lambda own, ours: {"weight": ours["g"] * own["weight"], "bias": ours["g"] * own["bias"] + ours["b"]},
)
# By whether the site is a norm and what of it is trained.
_CHANGES: Mapping[tuple[bool, tuple[str, ...]], tuple[Change, ...]] = {
    (False, ("weight",)): (DENSE,),
    (False, ("weight", "bias")): (DENSE, SHIFT),
    (False, ("bias",)): (SHIFT,),
    (True, ("weight",)): (SCALE,),
    (True, ("weight", "bias")): (SCALE_AND_SHIFT,),
    (True, ("bias",)): (SHIFT,),
}


def change_of(slot: Slot, site: Site) -> Change | None:
    """The change that the slot is at the site, where one of them is."""
    those = (one for (norm, _), changes in _CHANGES.items() if norm == (site.name in NORMS) for one in changes)
    return next((one for one in those if one.is_of(slot)), None)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a config trains in addition to a method whose sites are `wrapped`: the `saved` modules whole, and with
    `bias` the biases of none, of the method's modules (`lora_only`) or of all."""

    backbone_files: BackboneFiles
    wrapped: frozenset[Site]
    saved: frozenset[Site]
    bias: str

    def sites(self) -> Iterator[tuple[Site, tuple[str, ...], tuple[Change, ...]]]:
        """Each site with what of it is trained, and the changes that this is."""
        for site in candidates(self.backbone_files.shape):
            whole, of_method = site in self.saved, self.bias.endswith("_only") and site in self.wrapped
            bias = self.backbone_files.biased(site) and (whole or of_method or self.bias == "all")
            if ends := ("weight",) * whole + ("bias",) * bias:
                yield site, ends, _CHANGES[site.name in NORMS, ends]

    def changes(self) -> set[tuple[Site, Change]]:
        return {(site, change) for site, _, changes in self.sites() for change in changes}

    def key(self, site: Site) -> str:
        """PEFT's of what holds the site's numbers, which is inside what it wraps."""
        return f"{ROOT}{path(site, self.backbone_files.shape)}{'.base_layer' * (site in self.wrapped)}"

    def own(self, site: Site, ends: Iterable[str]) -> dict[str, Tensor]:
        """The numbers of the backbone's module that holds the site."""
        return {end: self.backbone_files.wide(f"{self.backbone_files.module(site)}.{end}") for end in ends}

    def seen(self, module: Values, site: Site) -> dict[str, Tensor]:
        """What the site computes with of such numbers, wide enough for sums of them."""
        return {end: self.backbone_files.part(v, site).double() + self._offset(site, end) for end, v in module.items()}

    def put(self, module: Values, site: Site, seen: Values) -> None:
        """The other way: replace the site's numbers of its module."""
        for end, value in seen.items():
            self.backbone_files.put(module[end], site, value - self._offset(site, end))

    def again(self) -> Mapping[str, str]:
        """The keys under which PEFT has the biases of whole modules once more, where it has all, and whose they are."""
        keys = (self.key(site) for site, ends, _ in self.sites() if site in self.saved and "bias" in ends)
        return {f"{key}.modules_to_save.bias": f"{key}.bias" for key in keys if self.bias == "all"}

    def unused(self) -> Mapping[str, str]:
        """Those under which it has them as they were, which no forward of it reads, and where the backbone has them."""
        return {
            key.replace(".modules_to_save.", ".original_module."): of.removeprefix(ROOT)
            for key, of in self.again().items()
        }

    def elsewhere(self) -> Mapping[str, str]:
        """And those of biases that no site has."""
        at_sites = {f"{self.backbone_files.module(site)}.bias" for site in candidates(self.backbone_files.shape)}
        others = (name for name in self.backbone_files.files if name.endswith(".bias") and name not in at_sites)
        return {f"{ROOT}{name}": name for name in others if self.bias == "all"}

    def _offset(self, site: Site, end: str) -> float:
        return self.backbone_files.norm_offset if site.name in NORMS and end == "weight" else 0.0
