"""A graft's tensors as PEFT keeps them, and back, by what the methods' files declare (`grafts/methods/exchange.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from polygraft.grafts.architectures.registry import architecture
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.formats.peft_modules import numbers, path
from polygraft.grafts.methods.declare import SiteShape
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.sites import KV_SITE, Site
from polygraft.grafts.sizes import TensorSpec
from polygraft.grafts.spec import Slot

Values = Mapping[str, Tensor]
_SOME = 1 << 20


class Exchange:
    """The tensors of one graft of one method on one backbone."""

    def __init__(self, layout: Peft, graft: BoundGraft, backbone_files: BackboneFiles | None = None) -> None:
        self._layout, self._spec, self._shape = layout, graft.spec, graft.shape
        needed = layout.untied or (layout.packed is not None and layout.packed.reads_backbone)
        if needed and backbone_files is None:
            raise FormatError(f"{layout.kind}: PEFT keeps it together with the backbone's own numbers; name its folder")
        if layout.untied and backbone_files is not None and backbone_files.tied:
            raise FormatError(f"{layout.kind}: PEFT edits the head tied to the embeddings, too; keep the native folder")
        self._more = (backbone_files, graft.spec) if layout.packed is not None and layout.packed.reads_backbone else ()
        self._tensors = graft.tensors

    def write(self, values: Values) -> dict[str, Tensor]:
        """PEFT's tensors by their keys, from ours by name."""
        if self._layout.packed is not None:
            made = self._layout.packed.pack(values, self._tensors, self._module, *self._more)
            return {key: _own_copy(value) for key, value in made.items()}
        found = {key: torch.zeros(size) for key, size in self._blank.items()}
        for tensor, kept in self._kept:
            written = _write(kept, values[tensor.name], self._slot(tensor), self._place(tensor))
            found[self._key(tensor, kept)] = _own_copy(written)
        return found

    def read(self, stored: Values) -> dict[str, Tensor]:
        """Ours by name, float32, from PEFT's by key; raises FormatError unless they are just those of the graft."""
        self._fits(stored)
        if self._layout.packed is not None:
            return self._unpacked(stored)
        keys = {tensor.name: self._key(tensor, kept) for tensor, kept in self._kept}
        self._same({*keys.values(), *self._passed_over(stored)}, stored)
        kept = {tensor.name: self._own(stored[keys[tensor.name]], tensor, kept) for tensor, kept in self._kept}
        found = {t.name: kept[t.name] if t.name in kept else torch.zeros(t.shape) for t in self._tensors}
        return {name: value.to(torch.float32).contiguous().clone() for name, value in found.items()}

    @cached_property
    def _kept(self) -> list[tuple[TensorSpec, Kept]]:
        found = []
        for tensor in self._tensors:
            kept = (self._layout.shared if tensor.site is None else self._layout.own).get(tensor.part)
            if kept is not None:
                found.append((tensor, kept))
            else:
                assert not tensor.trained, f"{self._layout.method}: nobody says where PEFT keeps {tensor.part}"
        return found

    @cached_property
    def _sites(self) -> list[Site]:
        return [site for site in dict.fromkeys(tensor.site for tensor in self._tensors) if site is not None]

    @cached_property
    def _numbers(self) -> Mapping[Site, int]:
        return numbers(self._sites, self._shape)

    def _module(self, site: Site) -> str:
        """The key of a site's module; prefix rows are kept by a layer's attention."""
        kept = Site(site.layer, "attn.out") if site.name == KV_SITE else site
        return f"base_model.model.{path(kept, self._shape)}"

    def _key(self, tensor: TensorSpec, kept: Kept) -> str:
        if kept.of == "file":
            return kept.key
        if kept.of == "model" or tensor.site is None:
            return f"base_model.{kept.key.format(n=self._numbers[tensor.site] if tensor.site is not None else 0)}"
        return f"{self._module(tensor.site)}.{kept.key}"

    @cached_property
    def _blank(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the zeros that PEFT keeps, too."""
        return {
            f"{self._module(site)}.{key}": size
            for site in self._sites
            for key, size in self._layout.blank(self._place_of(site)).items()
        }

    def _passed_over(self, stored: Values) -> set[str]:
        """Zeros that are there, and the copies of shared tensors that PEFT writes for every module."""
        for key in self._blank.keys() & stored.keys():
            if bool(stored[key].count_nonzero()):
                raise FormatError(f"{key}: is not zero, so this is another method")
        copies = {f"{self._module(site)}.{kept.key}" for site in self._sites for kept in self._layout.shared.values()}
        return (self._blank.keys() | copies) & stored.keys()

    def _own(self, stored: Tensor, tensor: TensorSpec, kept: Kept) -> Tensor:
        slot, place = self._slot(tensor), self._place(tensor)
        expected = torch.empty(tensor.shape, device="meta")
        rows = _write(kept, expected, slot, place, plain=True).shape
        if kept.rows and tensor.site is not None:
            fused = architecture(self._shape.arch).fused_with(tensor.site.name)
            width = sum(self._shape.dims(name)[1] for name in fused)
            if len(fused) > 1 and len(stored) == width and rows[0] == place.d_out:
                stored = stored[self._shape.rows(tensor.site.name)]
        if kept.padded:
            stored = _widened(stored, rows)
        if stored.shape != rows:
            raise FormatError(f"{tensor.name}: shape {tuple(stored.shape)} is not {tuple(rows)}")
        if kept.coded is not None:
            return kept.coded[1](stored, place)
        turned = expected.transpose(*kept.turned).shape if kept.turned else expected.shape
        value = stored.reshape(turned)
        return value.transpose(*kept.turned) if kept.turned else value

    def _unpacked(self, stored: Values) -> dict[str, Tensor]:
        packed = self._layout.packed
        assert packed is not None
        zeros = {tensor.name: torch.zeros(tensor.shape) for tensor in self._tensors}
        expected = packed.pack(zeros, self._tensors, self._module, *self._more)
        self._same(set(expected), stored)
        for key, value in expected.items():
            if value.shape != stored[key].shape:
                raise FormatError(f"{key}: shape {tuple(stored[key].shape)} is not {tuple(value.shape)}")
        found = packed.unpack(stored, self._tensors, self._module, *self._more)
        return {name: value.to(torch.float32).contiguous().clone() for name, value in found.items()}

    def _fits(self, stored: Values) -> None:
        """Raise FormatError before room is made for far more than the file holds."""
        count, held = sum(tensor.numel for tensor in self._tensors), sum(value.numel() for value in stored.values())
        if count > 64 * held + _SOME:
            raise FormatError(f"{held} numbers are too few for the {count} that the config asks for")

    def _same(self, expected: set[str], stored: Values) -> None:
        if expected != stored.keys():
            odd = sorted(expected ^ stored.keys())
            raise FormatError(f"{odd[:3]} are missing or unknown ({len(odd)} in all)")

    def _slot(self, tensor: TensorSpec) -> Slot:
        return self._spec.slots[tensor.slot]

    def _place(self, tensor: TensorSpec) -> SiteShape:
        return self._place_of(tensor.site or self._sites[0])

    def _place_of(self, site: Site) -> SiteShape:
        return SiteShape(site.layer, site.name, *self._shape.dims(site.name))


def _write(kept: Kept, value: Tensor, slot: Slot, place: SiteShape, *, plain: bool = False) -> Tensor:
    """Ours as PEFT's; `plain` in our own type, for its shape."""
    if kept.coded is not None:
        found = kept.coded[0](value, place)
    else:
        found = value.transpose(*kept.turned) if kept.turned else value
        if kept.shape is not None:
            found = found.reshape(kept.shape(slot) if callable(kept.shape) else kept.shape)
    return found if plain else found.detach().to(getattr(torch, kept.dtype))


def _widened(stored: Tensor, size: torch.Size) -> Tensor:
    """With zeros after what there is, up to the size."""
    if stored.ndim != len(size) or any(a > b for a, b in zip(stored.shape, size, strict=True)):
        return stored
    found = stored.new_zeros(size)
    found[tuple(slice(n) for n in stored.shape)] = stored
    return found


def _own_copy(value: Tensor) -> Tensor:
    return value.detach().contiguous().clone()
