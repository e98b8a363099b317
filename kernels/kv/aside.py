"""Attention to trained rows aside: every row also attends to its graft's own keys, in a softmax of their own.

LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199, section 3.2) scales the second softmax by a gate; the gate is in the
values here, since the sum is linear in them. Both softmaxes are of one row of scores in the paper, so that what bends
the backbone's own bends these. The rows need no place in a cache: they are the graft's, not a sequence's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.common.matmul import segment_bmm
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.kv.scores import Scores


def aside(  # noqa: PLR0913
    q_TE: Tensor, out_TE: Tensor, pk_PC: Tensor, pv_PC: Tensor, segments: Segments, kv_heads: int, scores: Scores
) -> Tensor:
    """Semantics: out[s.start:s.stop] += softmax(bent(scaling * q[s.start:s.stop] pk_s^T)) pv_s, head by head. Of the
    `scores` the scaling and the cap hold; the rows have no place that a window or a bias knows.

    q and out [T, heads * head_dim], stacks pk and pv [P, kv_heads * head_dim] of one dtype, softmax in float32 or
    wider. Differentiable in q, out, pk and pv; products and sums are inside a segment.
    """
    if not segments.items:
        return out_TE
    return _Aside.apply(q_TE, out_TE, pk_PC, pv_PC, segments, kv_heads, scores)  # type: ignore[no-any-return,no-untyped-call]


class _Aside(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: FunctionCtx,
        q: Tensor,
        out: Tensor,
        pk: Tensor,
        pv: Tensor,
        segments: Segments,
        kv_heads: int,
        scores: Scores,
    ) -> Tensor:
        ctx.save_for_backward(q, pk, pv)
        ctx.work = segments, kv_heads, scores  # type: ignore[attr-defined]
        result = out.clone()
        for s in segments:
            k, v = keys_of(pk, s, kv_heads), keys_of(pv, s, kv_heads)
            weights, _ = _weights(queries_of(q, s, k), k, scores)
            result[s.start : s.stop] += rows_of(segment_bmm(weights, v), s)
        return result

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, pk, pv = ctx.saved_tensors  # type: ignore[attr-defined]
        segments, kv_heads, scores = ctx.work  # type: ignore[attr-defined]
        dq, dpk, dpv = torch.zeros_like(q), torch.zeros_like(pk), torch.zeros_like(pv)
        for s in segments:
            k, v = keys_of(pk, s, kv_heads), keys_of(pv, s, kv_heads)
            qs, slope = queries_of(q, s, k), queries_of(grad, s, k)
            weights, bend = _weights(qs, k, scores)  # again: they are as many as the rows times the keys
            p = weights.to(torch.promote_types(q.dtype, torch.float32))
            dw = segment_bmm(slope, v.transpose(1, 2).contiguous()).to(p.dtype)
            ds = (p * (dw - (p * dw).sum(-1, keepdim=True)) * bend * scores.scaling).to(q.dtype)
            dq[s.start : s.stop] += rows_of(segment_bmm(ds, k), s)
            for into, left, right in ((dpk, ds, qs), (dpv, weights, slope)):
                own = segment_bmm(left.transpose(1, 2).contiguous(), right)
                into[s.first : s.last] += own.transpose(0, 1).flatten(1)
        return dq, grad, dpk, dpv, None, None, None


def queries_of(x_TE: Tensor, s: Segment, keys: Tensor) -> Tensor:
    """A segment's rows beside `keys`, [kv_heads, rows * group, head_dim]."""
    kv_heads, _, head_dim = keys.shape
    rows = x_TE[s.start : s.stop].reshape(s.rows, kv_heads, -1, head_dim).transpose(0, 1)
    return rows.reshape(kv_heads, -1, head_dim)


def keys_of(p_PC: Tensor, s: Segment, kv_heads: int) -> Tensor:
    """[kv_heads, size, head_dim]."""
    return torch.unflatten(p_PC[s.first : s.last], 1, (kv_heads, -1)).transpose(0, 1).contiguous()


def rows_of(x: Tensor, s: Segment) -> Tensor:
    """[rows, heads * head_dim] of [kv_heads, rows * group, head_dim]."""
    return torch.unflatten(x, 1, (s.rows, -1)).transpose(0, 1).flatten(1)


def _weights(q: Tensor, k: Tensor, scores: Scores) -> tuple[Tensor, Tensor | float]:
    """And the slope of the bent scores."""
    raw = segment_bmm(q * scores.scaling, k.transpose(1, 2).contiguous())
    bent, bend = scores.bent(raw.to(torch.promote_types(q.dtype, torch.float32)))
    return bent.softmax(-1).to(q.dtype), bend
