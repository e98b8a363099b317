"""The tokens op: trained rows in the input embeddings, in place of what stands there or added to it (prompt tuning,
textual inversion, DePT)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def tokens(x_TD: Tensor, p_PD: Tensor, index_T: Tensor, add: bool) -> Tensor:
    """Semantics: out[t] = p[index[t]], or x[t] + p[index[t]] with `add`, where index[t] >= 0; else x[t].

    x [T, D]; p [P, D] in float32 (float64 beside float64), rounded once; index [T] int64, -1 where no row is placed.
    Differentiable in x and p. dp sums over the rows that use a row of p, in batch order: rows of one graft alone.
    """
    if x_TD.is_cuda:
        from polygraft.kernels.tokens import gpu

        return gpu.tokens(x_TD, p_PD, index_T, add)
    return _Tokens.apply(x_TD, p_PD, index_T, add)  # type: ignore[no-any-return,no-untyped-call]


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, p: Tensor, index: Tensor, add: bool) -> Tensor:
        rows = (index >= 0).nonzero().squeeze(1)
        ctx.save_for_backward(rows, index[rows])
        ctx.work = add, p.shape, p.dtype  # type: ignore[attr-defined]
        out = x.clone()
        own = p[index[rows]]
        out[rows] = (x[rows] + own if add else own).to(x.dtype)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, places = ctx.saved_tensors  # type: ignore[attr-defined]
        add, shape, dtype = ctx.work  # type: ignore[attr-defined]
        dp = torch.zeros(shape, dtype=dtype, device=grad.device).index_add_(0, places, grad[rows].to(dtype))
        return grad if add else grad.index_fill(0, rows, 0), dp, None, None
