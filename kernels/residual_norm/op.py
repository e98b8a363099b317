"""The residual_norm op: the residual sum and the frozen norm that reads it, in one pass; RMS (Zhang & Sennrich 2019,
arXiv 1910.07467, eq. 4) and layer norm (Ba et al. 2016, arXiv 1607.06450).

Every number is rounded where transformers rounds it: the sum to x's dtype; an RMS norm's quotient to the weight's
dtype before the product. A row is one thread's from its first number to its last, in one order, so that neither other
rows nor the number of threads has a part in its bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from polygraft.kernels.compiled.calls import DTYPES, Call, Function, computes, function, structure

_SOURCE = Path(__file__).with_name("residual_norm.cpp")
_FORWARD = structure(
    "Forward",
    pointers="x update sum weight bias y means scales",
    integers="rows width dtype weight_dtype centred",
    numbers="eps",
    integers_="threads",
)
_BACKWARD = structure(
    "Backward", pointers="dy dsum x weight means scales dx", integers="rows width dtype weight_dtype threads"
)


@dataclass(frozen=True, slots=True)
class Norm:
    """y = w (x - mean) / std + b when `centred`, else y = w x / rms(x); weight and bias [D] frozen, of one dtype."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool


def apply(x_TD: Tensor, norm: Norm) -> Tensor:
    """Semantics: y[t] = norm(x[t]), [.., D] in x's dtype, computed in float32 or wider; differentiable in x."""
    if norm.centred and _compiled(x_TD, norm) is None:
        return F.layer_norm(x_TD, x_TD.shape[-1:], norm.weight, norm.bias, norm.eps)
    if torch.is_grad_enabled() and x_TD.requires_grad:
        return _ResidualNorm.apply(x_TD, None, norm)[1]  # type: ignore[no-any-return,no-untyped-call]
    return _forward(x_TD, None, norm, keep=False)[1]


def residual_norm(x_TD: Tensor, update_TD: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Semantics: s = x + update, y[t] = norm(s[t]); (s, y), both [.., D] in x's dtype; differentiable in x and update.
    Kept for a backward are s and one float32 a row, two of them when centred."""
    if _compiled(x_TD, norm) is None:
        sums = x_TD + update_TD
        return sums, apply(sums, norm)
    if torch.is_grad_enabled() and (x_TD.requires_grad or update_TD.requires_grad):
        return _ResidualNorm.apply(x_TD, update_TD, norm)  # type: ignore[no-any-return,no-untyped-call]
    return _forward(x_TD, update_TD, norm, keep=False)[:2]


def ready(x_TD: Tensor, update_TD: Tensor | None, norm: Norm, y_TD: Tensor) -> Call | None:
    """The call that adds the update to x in place and writes the norm of it to y, all contiguous; None where it is not
    compiled."""
    compiled = _compiled(x_TD, norm)
    return None if compiled is None else _call(compiled, (x_TD, update_TD, x_TD), norm, y_TD, (None, None))


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, update: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        sums, y, means, scales = _forward(x, update, norm, keep=True)
        ctx.save_for_backward(sums, scales, means)  # type: ignore[arg-type]  # None is allowed
        ctx.norm, ctx.adds = norm, update is not None  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        if update is None:
            ctx.mark_non_differentiable(placeholder := x.new_empty(0))
            return placeholder, y
        return sums, y

    @staticmethod
    def backward(ctx: FunctionCtx, dsum: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dsum, dsum, None
        sums, scales, means = ctx.saved_tensors  # type: ignore[attr-defined]
        dx = _backward(dy, dsum if ctx.adds else None, (sums, means, scales), ctx.norm)  # type: ignore[attr-defined]
        return dx, dx if ctx.adds else None, None  # type: ignore[attr-defined]


def _forward(
    x: Tensor, update: Tensor | None, norm: Norm, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The sum, its norm, and what a backward needs: means [.., 1] of a centred norm, and 1 / std or 1 / rms."""
    compiled = _compiled(x, norm)
    if compiled is None:
        assert update is None
        return x, *_steps(x, norm)
    x, update = x.contiguous(), None if update is None else update.contiguous()
    sums, y = x if update is None else torch.empty_like(x), torch.empty_like(x)
    means = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) if keep and norm.centred else None
    scales = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) if keep else None
    _call(compiled, (x, update, sums), norm, y, (means, scales))()
    return sums, y, means, scales


def _steps(x: Tensor, norm: Norm) -> tuple[Tensor, None, Tensor]:
    """An RMS norm by torch, and what a backward needs."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scales = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    quotient = wide * scales
    if norm.weight is None:
        return quotient.to(x.dtype), None, scales
    return (norm.weight * quotient.to(norm.weight.dtype)).to(x.dtype), None, scales


def _backward(dy: Tensor, dsum: Tensor | None, kept: tuple[Tensor, Tensor | None, Tensor], norm: Norm) -> Tensor:
    """dx: through the norm, rounded, plus that of the sum; of x, means and scales."""
    x, means, scales = kept
    compiled = (
        function(_SOURCE, "residual_norm_backward", _BACKWARD) if _compiled(x, norm) and dy.dtype == x.dtype else None
    )
    if compiled is None:
        wide = x.to(scales.dtype)
        slope = (dy if norm.weight is None else dy * norm.weight).to(scales.dtype)
        inner = (slope * wide).mean(-1, keepdim=True) * scales.square()
        through = ((slope - wide * inner) * scales).to(x.dtype)
        return through if dsum is None else dsum + through
    dy, dx = dy.contiguous(), torch.empty_like(x)
    compiled.ready(
        dy=dy,
        dsum=None if dsum is None else dsum.contiguous(),
        x=x,
        weight=norm.weight,
        means=means,
        scales=scales,
        dx=dx,
        rows=x.numel() // x.shape[-1],
        width=x.shape[-1],
        dtype=DTYPES[x.dtype],
        weight_dtype=_weight_dtype(x, norm),
        threads=torch.get_num_threads(),
    )()
    return dx


def _compiled(x: Tensor, norm: Norm) -> Function | None:
    same = norm.bias is None or (norm.weight is not None and norm.weight.dtype == norm.bias.dtype)
    return function(_SOURCE, "residual_norm", _FORWARD) if same and computes(x, norm.weight) else None


def _call(
    compiled: Function,
    rows: tuple[Tensor, Tensor | None, Tensor],
    norm: Norm,
    y: Tensor,
    kept: tuple[Tensor | None, Tensor | None],
) -> Call:
    """Of x, the update and where their sum goes; means and scales are kept where there is room for them."""
    x, update, sums = rows
    return compiled.ready(
        x=x,
        update=update,
        sum=sums,
        weight=norm.weight,
        bias=norm.bias,
        y=y,
        means=kept[0],
        scales=kept[1],
        rows=x.numel() // x.shape[-1],
        width=x.shape[-1],
        dtype=DTYPES[x.dtype],
        weight_dtype=_weight_dtype(x, norm),
        centred=norm.centred,
        eps=norm.eps,
        threads=torch.get_num_threads(),
    )


def _weight_dtype(x: Tensor, norm: Norm) -> int:
    return DTYPES[x.dtype if norm.weight is None else norm.weight.dtype]
