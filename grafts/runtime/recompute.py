"""Tensors that a backward makes again in place of keeping them: cheap ones beside the GEMMs they feed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

# Views of all elements in their order, by the names that autograd gives their steps.
_VIEWS = ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "UnsqueezeBackward", "SqueezeBackward")


def recomputed(x: Tensor, make: Callable[[], Tensor] | None) -> AbstractContextManager[object]:
    """Whatever is done to `x` inside keeps `make` for its backward and not x; `make` returns the same values.

    What is x, or a view of it, autograd says: the step that gave it. Other tensors are kept as ever, as is x where
    there is no gradient to wait for or nothing to make it with. Of nested contexts the innermost alone holds.
    """
    given = x.grad_fn
    if make is None or given is None or not torch.is_grad_enabled():
        return nullcontext()
    output = x.output_nr

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if _viewed(saved, given) == (given, output) else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else make().view(packed)

    return saved_tensors_hooks(pack, unpack)


def _viewed(x: Tensor, end: Node) -> tuple[Node | None, int]:
    """The step that gave what `x` is a view of, and which of its outputs that is; no further back than `end`."""
    node, output = x.grad_fn, x.output_nr
    while node is not None and node is not end and node.name().startswith(_VIEWS):
        ((node, output),) = node.next_functions
    return node, output
