"""The copies op: many small copies between dtypes in one pass by all threads; each alone would be one thread's."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from polygraft.kernels.compiled.calls import DTYPES, computes, function, structure

_SOURCE = Path(__file__).with_name("copies.cpp")
_COPIES = structure("Copies", pointers="into of sizes", integers="count into_dtype of_dtype threads")


def copy_each(into: Sequence[Tensor], of: Sequence[Tensor]) -> None:
    """Semantics: into[i] = of[i], rounded to nearest, ties to even, in the dtype of into[i]. No two may overlap. Not
    differentiable."""
    ready(into, of)()


def ready(into: Sequence[Tensor], of: Sequence[Tensor]) -> Callable[[], object]:
    """`copy_each` of these tensors as they will be then."""
    if not into:
        return lambda: None
    compiled = function(_SOURCE, "copies", _COPIES) if _alike(into) and _alike(of) else None
    if compiled is None:
        return lambda: torch._foreach_copy_([*into], [*of])
    sizes = array("q", [x.numel() for x in into])
    assert list(sizes) == [x.numel() for x in of]
    places = [array("q", [x.data_ptr() for x in tensors]) for tensors in (into, of)]
    pointers = dict(zip(("into", "of", "sizes"), (each.buffer_info()[0] for each in (*places, sizes)), strict=True))
    dtypes = {"into_dtype": DTYPES[into[0].dtype], "of_dtype": DTYPES[of[0].dtype]}
    return compiled.ready(
        *(into, of, places, sizes), **pointers, **dtypes, count=len(sizes), threads=torch.get_num_threads()
    )


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Whether they are contiguous, of one dtype that is compiled."""
    return len({x.dtype for x in tensors}) == 1 and computes(*tensors) and all(x.is_contiguous() for x in tensors)
