"""Gated prefix rows that join a softmax: every row also attends to its graft's own keys, which it weighs itself, in one
softmax with what it attended to before.

UniPELT (Mao et al. 2022, arXiv 2110.07577, section 3) multiplies prefix keys and values by one gate of the input, APT
(Zhang et al. 2023, arXiv 2305.15212) by one for every prefix row. A softmax over more keys is the old one's output
beside the new values, weighed by the log of its sum; so that the new rows need no place in a cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.common.gate import Gate
from polygraft.kernels.common.matmul import add_segment_bmm_, segment_bmm
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.kv.aside import keys_of, queries_of, rows_of
from polygraft.kernels.kv.scores import Scores


def joined(  # noqa: PLR0913
    q_TE: Tensor,
    out_TE: Tensor,
    sums_TH: Tensor,
    x_TD: Tensor,
    pk_PC: Tensor,
    pv_PC: Tensor,
    G_ND: Tensor,
    segments: Segments,
    gates: Segments,
    gate: Gate,
    kv_heads: int,
    scores: Scores,
) -> Tensor:
    """Semantics: with s and g the i-th of `segments` and `gates`, w = gate(x_s G_g^T) spread over s.size / g.size
    neighbouring prefix rows each, out[s] = softmax([sums[s]; bent(scaling * w * (q[s] pk_s^T))]) [out[s]; w * pv_s],
    head by head. Of the `scores` the scaling and the cap hold; prefix rows have no place that a window or a bias knows.

    q and out [T, heads * head_dim], sums [T, heads] the log of the sum that out was divided by, x [T, D], stacks pk and
    pv [P, kv_heads * head_dim] and G [N, D]; softmax in float32 or wider. Differentiable in the seven tensors; products
    and sums are inside a segment.
    """
    if not segments.items:
        return out_TE
    return _Joined.apply(  # type: ignore[no-any-return,no-untyped-call]
        q_TE, out_TE, sums_TH, x_TD, pk_PC, pv_PC, G_ND, segments, gates, gate, kv_heads, scores
    )


class _Share(NamedTuple):
    """What forward and backward need of a segment; M = rows * group query rows of one key head."""

    k: Tensor  # [kv_heads, size, head_dim]
    v: Tensor
    q: Tensor  # [kv_heads, M, head_dim]
    gates: Tensor  # [rows, experts]
    spread: Tensor  # [M, size]
    raw: Tensor  # scaling * q k^T, [kv_heads, M, size]
    bend: Tensor | float  # slope of the capped scores, [kv_heads, M, size]
    new: Tensor  # weights of the prefix rows, [kv_heads, M, size]
    old: Tensor  # weight of what was attended to before, [kv_heads, M, 1]


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: FunctionCtx,
        q: Tensor,
        out: Tensor,
        sums: Tensor,
        x: Tensor,
        pk: Tensor,
        pv: Tensor,
        G: Tensor,
        segments: Segments,
        gates: Segments,
        gate: Gate,
        kv_heads: int,
        scores: Scores,
    ) -> Tensor:
        ctx.save_for_backward(q, out, sums, x, pk, pv, G)
        ctx.work = segments, gates, gate, kv_heads, scores  # type: ignore[attr-defined]
        result = out.clone()
        for s, g in zip(segments, gates, strict=True):
            one = _share(q, sums, x, pk, pv, G, s, g, gate, kv_heads, scores)
            before = queries_of(out, s, one.k)
            mixed = one.old * before + segment_bmm((one.new * one.spread).to(q.dtype), one.v)
            result[s.start : s.stop] = rows_of(mixed.to(q.dtype), s)
        return result

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, out, sums, x, pk, pv, G = ctx.saved_tensors  # type: ignore[attr-defined]
        segments, gates, gate, kv_heads, scores = ctx.work  # type: ignore[attr-defined]
        dout = grad.clone()
        dq, dsums, dx, dpk, dpv, dG = (torch.zeros_like(tensor) for tensor in (q, sums, x, pk, pv, G))
        for s, g in zip(segments, gates, strict=True):
            one = _share(q, sums, x, pk, pv, G, s, g, gate, kv_heads, scores)
            slope, before = queries_of(grad, s, one.k), queries_of(out, s, one.k)
            along = (slope * before).to(one.old.dtype).sum(-1, keepdim=True)
            dvalue = segment_bmm(slope, one.v.transpose(1, 2).contiguous()).to(one.new.dtype)
            inner = one.old * along + (one.new * one.spread * dvalue).sum(-1, keepdim=True)
            dscore = one.new * (one.spread * dvalue - inner) * one.bend
            dspread = (dscore * one.raw + one.new * dvalue).sum(0).view(s.rows, -1, s.size).sum(1)
            dscores = gate.slope(dspread.view(*one.gates.shape, -1).sum(-1).to(x.dtype), one.gates)[None]
            draw = (dscore * one.spread * scores.scaling).to(q.dtype)
            dout[s.start : s.stop] = rows_of((one.old * slope).to(q.dtype), s)
            dsums[s.start : s.stop] = rows_of(one.old * (along - inner), s)
            dq[s.start : s.stop] += rows_of(segment_bmm(draw, one.k), s)
            weights = (one.new * one.spread).to(q.dtype)
            for into, left, right in ((dpk, draw, one.q), (dpv, weights, slope)):
                own = segment_bmm(left.transpose(1, 2).contiguous(), right)
                into[s.first : s.last] += own.transpose(0, 1).flatten(1)
            dG[g.first : g.last] += segment_bmm(dscores.transpose(1, 2).contiguous(), x[None, s.start : s.stop])[0]
            add_segment_bmm_(dx[None, s.start : s.stop], dscores, G[None, g.first : g.last])
        return dq, dout, dsums, dx, dpk, dpv, dG, None, None, None, None, None


def _share(  # noqa: PLR0913
    q: Tensor,
    sums: Tensor,
    x: Tensor,
    pk: Tensor,
    pv: Tensor,
    G: Tensor,
    s: Segment,
    g: Segment,
    gate: Gate,
    kv_heads: int,
    scores: Scores,
) -> _Share:
    k, v = keys_of(pk, s, kv_heads), keys_of(pv, s, kv_heads)
    queries = queries_of(q, s, k)
    weights = gate.weights(segment_bmm(x[None, s.start : s.stop], G[None, g.first : g.last].transpose(1, 2))[0])
    spread = weights.repeat_interleave(s.size // g.size, dim=1)
    spread = spread.repeat_interleave(queries.shape[1] // s.rows, dim=0).to(sums.dtype)
    raw = segment_bmm(queries, k.transpose(1, 2).contiguous()).to(sums.dtype) * scores.scaling
    before = torch.unflatten(sums[s.start : s.stop], 1, (kv_heads, -1)).transpose(0, 1).reshape(kv_heads, -1, 1)
    scored, bend = scores.bent(spread * raw)
    shares = torch.cat([before, scored], dim=-1).softmax(-1)
    return _Share(k, v, queries, weights, spread, raw, bend, shares[..., 1:], shares[..., :1])
