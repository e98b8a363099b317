"""Tensors that a backward makes again in place of keeping them: cheap ones beside the GEMMs they feed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recomputed(x: Tensor, make: Callable[[], Tensor] | None) -> AbstractContextManager[object]:
    """Whatever is done to `x` inside keeps `make` for its backward and not x; `make` returns the same values.

    Other tensors are kept as ever, as is x where there is no gradient to wait for or nothing to make it with. Of nested
    contexts the innermost alone holds.
    """
    if make is None or not (torch.is_grad_enabled() and x.requires_grad):
        return nullcontext()
    # No other tensor's place while x lives, which is as long as the context does. The hooks must not hold x itself.
    place, size = x.data_ptr(), x.numel()

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.data_ptr() == place and saved.numel() == size else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else make().view(packed)

    return saved_tensors_hooks(pack, unpack)
