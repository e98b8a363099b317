"""Frozen norms of rows: RMS (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4) and layer norm (Ba et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class FrozenNorm:
    """y = w (x - mean) / std + b when `centred`, else y = w x / rms(x); a call is differentiable in x alone."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool

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
        if self.centred:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        assert self.weight is not None
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w * (x / sqrt(mean(x^2) + eps)), in float32 or wider and rounded to w's dtype before the product as transformers
    does; differentiable in x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return,no-untyped-call]
    return _forward(x, weight, eps)[0]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        y, scale = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        x, weight, scale = ctx.saved_tensors
        wide = x.to(scale.dtype)
        g = (grad * weight).to(scale.dtype)
        inner = (g * wide).mean(-1, keepdim=True) * scale.square()
        return ((g - wide * inner) * scale).to(x.dtype), None, None


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * (wide * scale).to(weight.dtype)).to(x.dtype), scale
