"""The tensors of a graft on a backbone: names, shapes, starting values, and their sum. Torch-free, derived from the
slots."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from polygraft.grafts.sites import ModelShape, Site, sites_of
from polygraft.grafts.spec import KV, Affine, Branch, GraftSpec, Norm

Part = Literal["A", "B", "g", "b", "m", "k", "v"]
Start = Literal["kaiming", "zero", "one", "row_norm", "prefix"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its slot and site, its part of the op (A, B of a branch; g, b of an affine; m; k, v) and how it
    starts."""

    slot: int
    site: Site
    part: Part
    shape: tuple[int, ...]
    start: Start

    @property
    def name(self) -> str:
        return f"{self.slot}.{self.site}.{self.part}"

    @property
    def numel(self) -> int:
        return prod(self.shape)


def tensors(spec: GraftSpec, shape: ModelShape) -> tuple[TensorSpec, ...]:
    """Every tensor of the graft in file and slab order. A is [rank, in]; B is stored transposed, [rank, out]."""
    found: list[TensorSpec] = []
    for index, site in sites_of(spec, shape):
        d_in, d_out = shape.dims(site.name)

        def add(part: Part, size: tuple[int, ...], start: Start, index: int = index, site: Site = site) -> None:
            found.append(TensorSpec(index, site, part, size, start))

        match spec.slots[index]:
            case Branch(rank=rank):
                add("A", (rank, d_in), "kaiming")
                add("B", (rank, d_out), "zero")
            case Affine(scale=scale, shift=shift, side=side):
                width = d_in if side == "in" else d_out
                if scale:
                    add("g", (width,), "one")
                if shift:
                    add("b", (width,), "zero")
            case Norm():
                add("m", (d_out,), "row_norm")
            case KV(length=length):
                add("k", (length, shape.kv_width), "prefix")
                add("v", (length, shape.kv_width), "prefix")
    return tuple(found)


def parameters(spec: GraftSpec, shape: ModelShape) -> int:
    """Trainable parameters of the graft on a backbone of this shape."""
    return sum(tensor.numel for tensor in tensors(spec, shape))
