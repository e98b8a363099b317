"""Self-attention of rows that are turned by their positions, with no transposed copy of queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polygraft.grafts.runtime.attention import attended
from polygraft.grafts.runtime.modules import SiteLinear, joined
from polygraft.kernels.kv.scores import Scores
from polygraft.kernels.rotary.op import turned, turned_joined


class RotaryAttention(nn.Module):
    """o(attention(turned(q(x)), turned(k(x)), v(x))), as transformers' Llama, Mistral, Qwen2 and, with a norm of every
    head's query and key, Qwen3 compute it; made of the module that one of them has."""

    layer_idx: int
    scaling: float
    head_dim: int
    sliding_window: int | None

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        for name, module in inner.named_children():
            self.add_module(name, module)
        self.scaling, self.head_dim = inner.scaling, inner.head_dim  # type: ignore[assignment]
        # Mistral asks for its window with every call, the others say it of each layer.
        self.sliding_window = getattr(inner, "sliding_window", getattr(inner.config, "sliding_window", None))

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object
    ) -> tuple[Tensor, None]:
        angles = position_embeddings[0][0], position_embeddings[1][0]
        members: list[SiteLinear] = [self.get_submodule(f"{part}_proj") for part in "qkv"]  # type: ignore[misc]
        alone = "q_norm" in self._modules or not torch.is_grad_enabled()
        both = None if alone else joined(members, hidden_states)
        if both is not None:
            widths = members[0].linear.widths
            q, k, v = turned_joined(both.squeeze(0), widths, angles, widths[0] // self.head_dim)
        else:
            q, k, v = (member(hidden_states).squeeze(0) for member in members)
            q, k = self._normed("q_norm", q), self._normed("k_norm", k)
            q, k = turned(q, k, angles, q.shape[1] // self.head_dim)
        kv_heads = k.shape[1] // self.head_dim
        out = attended(self.layer_idx, q, k, v, kv_heads, Scores(self.scaling, self.sliding_window))
        return self.get_submodule("o_proj")(out[None]), None

    def _normed(self, name: str, x_TE: Tensor) -> Tensor:
        """With the norm of that name over every head, where there is one."""
        norm = self._modules.get(name)
        if norm is None:
            return x_TE
        y: Tensor = norm(torch.unflatten(x_TE, 1, (-1, self.head_dim)))
        return y.flatten(1)
