"""The gated feed-forward (SwiGLU; Shazeer 2020), which keeps its two factors for the backward and not their product."""

from __future__ import annotations

from torch import Tensor, nn

from polygraft.grafts.runtime.recompute import recomputed
from polygraft.kernels.swiglu.op import product, swiglu


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) of three projections, as transformers' Llama MLP computes it."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        y, factors = swiglu(gate, up), (gate.detach(), up.detach())
        with recomputed(y, lambda: product(*factors)):
            return self.down_proj(y)  # type: ignore[no-any-return]
