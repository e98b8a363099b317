"""Frozen norms of rows, as the modules of a transformers class say them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polygraft.kernels.residual_norm.op import Norm, apply


@dataclass(frozen=True, slots=True)
class FrozenNorm(Norm):
    """A norm that nothing trains; a call is differentiable in x alone."""

    @staticmethod
    def of(module: nn.Module, offset: float = 0.0) -> FrozenNorm | None:
        """The norm that a transformers module is, None for one that is none. `offset` is added to an RMS norm's weight,
        in float32 or wider."""
        if isinstance(module, nn.LayerNorm):
            weight, bias = (None if x is None else x.detach() for x in (module.weight, module.bias))
            return FrozenNorm(weight, bias, module.eps, centred=True)
        if not type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):  # T5's has no mean
            return None
        weight = module.get_parameter("weight").detach()
        if offset:
            weight = offset + weight.to(torch.promote_types(weight.dtype, torch.float32))
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        assert isinstance(eps, float)
        return FrozenNorm(weight, None, eps, centred=False)

    def __call__(self, x: Tensor) -> Tensor:
        return apply(x, self)
