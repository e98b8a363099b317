"""Ground truth of attention over ragged sequences with prefixes: one sequence after the other in float32 (float64
stays)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from polygraft.kernels.kv.layout import Continued, Layout
from polygraft.kernels.kv.scores import Scores


def attend(  # noqa: PLR0913
    q_TE: Tensor, k_TC: Tensor, v_TC: Tensor, pk_PC: Tensor, pv_PC: Tensor, layout: Layout, scores: Scores
) -> Tensor:
    """softmax(scaling * q [pk; k]^T, causal) [pv; v] of every sequence; rows outside sequences are 0. Same shapes as
    the op."""
    wide = torch.promote_types(q_TE.dtype, torch.float32)
    pieces: list[Tensor] = []
    end = 0
    for s in layout.sequences:
        pieces.append(q_TE.new_zeros(s.start - end, q_TE.shape[1], dtype=wide))
        (first, count), rows = s.keys, slice(s.start, s.start + s.length)
        keys = slice(first, first + count)
        prefix = slice(s.prefix_first, s.prefix_first + s.prefix_length)
        q = torch.unflatten(q_TE[rows].to(wide), 1, (layout.heads, -1)).transpose(0, 1)
        k, v = (
            torch.unflatten(torch.cat([p[prefix], x[keys]]).to(wide), 1, (layout.kv_heads, -1))
            .transpose(0, 1)
            .repeat_interleave(layout.heads // layout.kv_heads, 0)
            for p, x in ((pk_PC, k_TC), (pv_PC, v_TC))
        )
        hidden = torch.zeros(s.length, s.prefix_length + count, dtype=torch.bool)
        for row in range(s.length if layout.causal else 0):
            hidden[row, s.prefix_length + row + 1 :] = True
            hidden[row, : _first(s.prefix_length + row, scores)] = True
        products = _bent(scores.scaling * q @ k.transpose(1, 2), scores)
        if scores.bias is not None:
            products = products + scores.bias[:, s.prefix_length :][:, : s.length, : products.shape[2]]
        weights = products.masked_fill(hidden, float("-inf")).softmax(-1)
        pieces.append((weights @ v).transpose(0, 1).flatten(1))
        end = s.start + s.length
    pieces.append(q_TE.new_zeros(len(q_TE) - end, q_TE.shape[1], dtype=wide))
    return torch.cat(pieces).to(q_TE.dtype)


def attend_paged(
    q_TE: Tensor, cache: Tensor, sequences: Sequence[Continued], heads: int, kv_heads: int, scores: Scores
) -> Tensor:
    """The same for rows that continue cached sequences, position after position; `gpu.attend_paged` has the shapes."""
    wide = torch.promote_types(q_TE.dtype, torch.float32)
    out = q_TE.new_zeros(q_TE.shape, dtype=wide)
    for s in sequences:
        context = cache[list(s.blocks)].flatten(0, 1).to(wide)
        keys, values = (torch.unflatten(context[:, part], 1, (kv_heads, -1)) for part in (0, 1))
        for row in range(s.rows):
            seen = slice(max(s.unseen, _first(s.before + row, scores)), s.before + row + 1)
            for head in range(heads):
                q = torch.unflatten(q_TE[s.start + row].to(wide), 0, (heads, -1))[head]
                own = head // (heads // kv_heads)
                weights = _bent(scores.scaling * keys[seen, own] @ q, scores).softmax(-1)
                torch.unflatten(out[s.start + row], 0, (heads, -1))[head] = weights @ values[seen, own]
    return out.to(q_TE.dtype)


def _bent(products: Tensor, scores: Scores) -> Tensor:
    return products if scores.cap is None else scores.cap * torch.tanh(products / scores.cap)


def _first(position: int, scores: Scores) -> int:
    """The first position that the query at `position` may see."""
    return 0 if scores.window is None else max(0, position - scores.window + 1)
