"""The tokens op on a GPU, by the library: every row is computed and some are chosen, since to ask how many there are
would be to wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def tokens(x_TD: Tensor, p_PD: Tensor, index_T: Tensor, add: bool) -> Tensor:
    """As `op.tokens`."""
    if not len(p_PD):  # nothing to place
        return x_TD
    return _Tokens.apply(x_TD, p_PD, index_T, add)  # type: ignore[no-any-return,no-untyped-call]


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, p: Tensor, index: Tensor, add: bool) -> Tensor:
        ctx.save_for_backward(index)
        ctx.work = add, p.shape, p.dtype  # type: ignore[attr-defined]
        own = p[index.clamp_min(0)]
        return torch.where((index >= 0).unsqueeze(1), (x + own if add else own).to(x.dtype), x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors  # type: ignore[attr-defined]
        add, (count, width), dtype = ctx.work  # type: ignore[attr-defined]
        # Rows without a token are added each to a row of its own that is dropped, and not all to one.
        nowhere = count + torch.arange(len(index), device=grad.device)
        dp = torch.zeros(count + len(index), width, dtype=dtype, device=grad.device)
        dp.index_add_(0, torch.where(index >= 0, index, nowhere), grad.to(dtype))
        return grad if add else grad.masked_fill((index >= 0).unsqueeze(1), 0), dp[:count], None, None
