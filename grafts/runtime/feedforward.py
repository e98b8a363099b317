"""The gated feed-forward (SwiGLU; Shazeer 2020), which keeps its two factors for the backward and not their product."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from polygraft.grafts.runtime.recompute import recomputed


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) of three projections, as transformers' Llama MLP computes it."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = swiglu(gate, up)
        factors = gate.detach(), up.detach()
        with recomputed(product, lambda: _forward(*factors)):
            return self.down_proj(product)  # type: ignore[no-any-return]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; differentiable in both."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.apply(gate, up)  # type: ignore[no-any-return,no-untyped-call]
    return _forward(gate, up)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors  # type: ignore[attr-defined]
        both = grad.new_empty(*grad.shape[:-1], 2 * grad.shape[-1])  # side by side, as the fused projection takes them
        d_gate, d_up = both.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return d_gate, d_up
