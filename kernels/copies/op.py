"""The copies op: many small copies between dtypes in one pass by all threads; each alone would be one thread's."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from polygraft.kernels.compiled.calls import DTYPES, Call, computes, function, structure

_SOURCE = Path(__file__).with_name("copies.cpp")
_COPIES = structure("Copies", pointers="into of sizes", integers="count into_dtype of_dtype threads")


def join(into_N: Tensor, of: Sequence[Tensor | None], sizes: Sequence[int]) -> None:
    """Semantics: into = all of these, so many numbers each, one after the other, rounded to nearest, ties to even, in
    the dtype of `into`, contiguous; where there is none it stays as it is. None may overlap it. Not differentiable."""
    stops = accumulate(sizes)
    there = [(x, size, stop - size) for x, size, stop in zip(of, sizes, stops, strict=True) if x is not None]
    parts = [x for x, _, _ in there]
    if _alike([into_N]) and _alike(parts):
        base, bytes_each = into_N.data_ptr(), into_N.element_size()
        places = array("q", [base + first * bytes_each for _, _, first in there])
        call = _call(places, into_N.dtype, parts, [size for _, size, _ in there])
        if call is not None:
            return call()
    for x, size, first in there:
        into_N[first : first + size].copy_(x.flatten())


def ready(into: Sequence[Tensor], of: Sequence[Tensor]) -> Callable[[], object]:
    """The copies into[i] = of[i], rounded as `join` rounds, of these tensors as they will be then. No two may
    overlap."""
    if not into:
        return lambda: None
    call = None
    if _alike(into) and _alike(of):
        places = array("q", [x.data_ptr() for x in into])
        call = _call(places, into[0].dtype, of, [x.numel() for x in into], into)
    return call or (lambda: torch._foreach_copy_([*into], [*of]))


def _call(
    places: array[int], dtype: torch.dtype, of: Sequence[Tensor], counts: Sequence[int], *keeps: object
) -> Call | None:
    """The call that writes so many numbers of each tensor to its place; None where it is not compiled."""
    compiled = function(_SOURCE, "copies", _COPIES)
    if compiled is None:
        return None
    assert [x.numel() for x in of] == counts
    sizes, sources = array("q", counts), array("q", [x.data_ptr() for x in of])
    return compiled.ready(
        *(*keeps, of, places, sources, sizes),
        into=places.buffer_info()[0],
        of=sources.buffer_info()[0],
        sizes=sizes.buffer_info()[0],
        count=len(sizes),
        into_dtype=DTYPES[dtype],
        of_dtype=DTYPES[of[0].dtype],
        threads=torch.get_num_threads(),
    )


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Whether there are some, contiguous and of one dtype that is compiled."""
    if not tensors or not computes(tensors[0]):
        return False
    dtype = tensors[0].dtype
    return all(x.dtype == dtype and x.is_cpu and x.is_contiguous() for x in tensors)
