"""Ground truth of attention over ragged sequences with prefixes: one sequence after the other in float32 (float64
stays)."""

import torch
from torch import Tensor

from polygraft.kernels.kv.layout import Layout


def attend(
    q_TE: Tensor, k_TC: Tensor, v_TC: Tensor, pk_PC: Tensor, pv_PC: Tensor, layout: Layout, scaling: float
) -> Tensor:
    """softmax(scaling * q [pk; k]^T, causal) [pv; v] of every sequence; rows outside sequences are 0. Same shapes as
    the op."""
    wide = torch.promote_types(q_TE.dtype, torch.float32)
    pieces: list[Tensor] = []
    end = 0
    for s in layout.sequences:
        pieces.append(q_TE.new_zeros(s.start - end, q_TE.shape[1], dtype=wide))
        rows = slice(s.start, s.start + s.length)
        prefix = slice(s.prefix_first, s.prefix_first + s.prefix_length)
        q = torch.unflatten(q_TE[rows].to(wide), 1, (layout.heads, -1)).transpose(0, 1)
        k, v = (
            torch.unflatten(torch.cat([p[prefix], x[rows]]).to(wide), 1, (layout.kv_heads, -1))
            .transpose(0, 1)
            .repeat_interleave(layout.heads // layout.kv_heads, 0)
            for p, x in ((pk_PC, k_TC), (pv_PC, v_TC))
        )
        hidden = torch.ones(s.length, s.prefix_length + s.length, dtype=torch.bool).triu(s.prefix_length + 1)
        scores = (scaling * q @ k.transpose(1, 2)).masked_fill(hidden, float("-inf"))
        pieces.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        end = s.start + s.length
    pieces.append(q_TE.new_zeros(len(q_TE) - end, q_TE.shape[1], dtype=wide))
    return torch.cat(pieces).to(q_TE.dtype)
