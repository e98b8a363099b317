"""Whether tensors are just those of a graft's description; what every format asks before it gives a graft out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polygraft.grafts.sites import ModelShape
from polygraft.grafts.sizes import tensors
from polygraft.grafts.spec import GraftSpec, SpecError


class FormatError(ValueError):
    """A graft folder that cannot be used; the message names the file and what is wrong with it."""


def check(spec: GraftSpec, values: Mapping[str, Tensor], shape: ModelShape) -> None:
    """Raise FormatError unless `values` are just the spec's tensors, of the right shapes and finite."""
    try:
        expected = {tensor.name: tensor.shape for tensor in tensors(spec, shape)}
    except SpecError as error:
        raise FormatError(str(error)) from None
    if expected.keys() != values.keys():
        odd = sorted(expected.keys() ^ values.keys())
        raise FormatError(f"tensors: {odd[:5]} are missing or unknown ({len(odd)} in all)")
    for name, size in expected.items():
        if tuple(values[name].shape) != size:
            raise FormatError(f"{name}: shape {tuple(values[name].shape)} is not {size}")
        if not bool(torch.isfinite(values[name]).all()):
            raise FormatError(f"{name}: holds values that are not finite")
