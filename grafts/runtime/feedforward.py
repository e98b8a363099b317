"""The gated feed-forward (SwiGLU; Shazeer 2020), which keeps its two factors for the backward and not their product."""

from __future__ import annotations

from torch import Tensor, nn

from polygraft.grafts.runtime.modules import SiteLinear, joined
from polygraft.grafts.runtime.recompute import recomputed
from polygraft.kernels.swiglu.op import product, swiglu, swiglu_joined


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) of three projections, as transformers' Llama MLP computes it."""

    def __init__(self, gate: SiteLinear, up: SiteLinear, down: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        both = joined((self.gate_proj, self.up_proj), x)
        if both is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
            y = swiglu(gate, up)
        else:
            y = swiglu_joined(both)
            gate, up = both.chunk(2, dim=-1)
        gate, up = gate.detach(), up.detach()
        with recomputed(y, lambda: product(gate, up)):
            return self.down_proj(y)  # type: ignore[no-any-return]
