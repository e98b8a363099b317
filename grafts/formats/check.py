"""Whether tensors are just those of a graft's description; what every format asks before it gives a graft out. Imports
without torch, as all that the ingress asks of formats does."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.spec import Sparse

if TYPE_CHECKING:
    from torch import Tensor


class FormatError(ValueError):
    """A graft folder that cannot be used; the message names the file and what is wrong with it."""


def sized(name: str, value: Tensor, *shapes: tuple[int, ...]) -> Tensor:
    """The value; raises FormatError unless it has one of the shapes."""
    if tuple(value.shape) not in shapes:
        raise FormatError(f"{name}: shape {tuple(value.shape)} is not {' or '.join(map(str, shapes))}")
    return value


def refuse_head(graft: BoundGraft) -> None:
    """Raise FormatError for a graft with a classifier, in a format that has no place for one."""
    if graft.head:
        raise FormatError("head: a classifier is kept in the native folder and in PEFT's; this format has none")


def check(graft: BoundGraft, values: Mapping[str, Tensor]) -> None:
    """Raise FormatError unless `values` are just the graft's tensors, of the right shapes and finite."""

    expected = {tensor.name: tensor.shape for tensor in graft.tensors}
    if expected.keys() != values.keys():
        odd = sorted(expected.keys() ^ values.keys())
        raise FormatError(f"tensors: {odd[:5]} are missing or unknown ({len(odd)} in all)")
    for name, size in expected.items():
        if not _finite(sized(name, values[name], size)):
            raise FormatError(f"{name}: holds values that are not finite")
    for tensor in graft.tensors:
        if tensor.site is not None and tensor.part == "i" and isinstance(graft.spec.slots[tensor.slot], Sparse):
            d_in, d_out = graft.shape.dims(tensor.site.name)
            _indices(tensor.name, values[tensor.name], (d_out, d_in)[: tensor.shape[1]])


def _finite(value: Tensor) -> bool:
    """By the least and the largest, which are NaN where one is."""
    import torch

    if value.dtype not in (torch.float32, torch.bfloat16) or not value.numel():
        return bool(torch.isfinite(value).all())
    return all(isfinite(float(end)) for end in torch.aminmax(value))


def _indices(name: str, value: Tensor, bounds: tuple[int, ...]) -> None:
    """Raise FormatError unless every column holds whole numbers from 0 to its bound."""
    for column, bound in zip(value.unbind(1), bounds, strict=True):
        if not bool(((column == column.floor()) & (column >= 0) & (column < bound)).all()):
            raise FormatError(f"{name}: holds numbers that are no index below {bound}")
