"""The kv op: attention of ragged sequences, each with its own trained prefix rows before its keys and values.

Prefix rows sit where a longer prompt would (Li & Liang 2021, eq. 3); a sequence is computed at its bucket's length,
padded on the right, where causality hides the padding from every real row, and a mask in an encoder.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.kv import whole
from polygraft.kernels.kv.layout import Bucket, Layout
from polygraft.kernels.kv.scores import Scores


def attend(  # noqa: PLR0913
    q_TE: Tensor, k_TC: Tensor, v_TC: Tensor, pk_PC: Tensor, pv_PC: Tensor, layout: Layout, scores: Scores
) -> Tensor:
    """Semantics: out[rows of s] = softmax(scaling * q[s] [pk_s; k[s]]^T, causal) [pv_s; v[s]], without the mask of the
    future where the layout is not causal; rows outside sequences are 0. `Scores` says what else a query does not see.

    q [T, heads * head_dim], k and v [T or rows of the sources, kv_heads * head_dim], prefix stacks pk and pv [P,
    the same]. Scores and products in the inputs' dtype (compiled, scores in float32: `whole`),
    softmax in float32 or wider. Differentiable in all five; prefix
    gradients sum over the sequences that use them, bucket by bucket, in float32 or wider.
    """
    if q_TE.is_cuda and layout.causal and scores.bias is None:
        from polygraft.kernels.kv import gpu  # Triton is loaded only where there is a GPU

        return gpu.attend(q_TE, k_TC, v_TC, pk_PC, pv_PC, layout, scores)
    if whole.supports((q_TE, k_TC, v_TC), layout, scores):
        return whole.attend(q_TE, k_TC, v_TC, pk_PC, pv_PC, layout, scores)[0]
    return _Attend.apply(q_TE, k_TC, v_TC, pk_PC, pv_PC, layout, scores, False)  # type: ignore[no-any-return,no-untyped-call]


def attend_with_sums(  # noqa: PLR0913
    q_TE: Tensor, k_TC: Tensor, v_TC: Tensor, pk_PC: Tensor, pv_PC: Tensor, layout: Layout, scores: Scores
) -> tuple[Tensor, Tensor]:
    """The same, and log sum exp of the scores of every row and head [T, heads], in float32 or wider and differentiable,
    for keys that join the softmax later; -inf where a row is in no sequence."""
    if q_TE.is_cuda and layout.causal:
        from polygraft.kernels.kv import gpu

        return gpu.attend_with_sums(q_TE, k_TC, v_TC, pk_PC, pv_PC, layout, scores)
    if whole.supports((q_TE, k_TC, v_TC), layout, scores):
        return whole.attend(q_TE, k_TC, v_TC, pk_PC, pv_PC, layout, scores)
    return _Attend.apply(q_TE, k_TC, v_TC, pk_PC, pv_PC, layout, scores, True)  # type: ignore[no-any-return,no-untyped-call]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pk: Tensor,
        pv: Tensor,
        layout: Layout,
        scores: Scores,
        with_sums: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        wide = torch.promote_types(q.dtype, torch.float32)
        sums = q.new_full((len(q), layout.heads if with_sums else 0), float("-inf"), dtype=wide)
        qx, kx, vx = _Rows(q, pk.new_zeros(len(pk), q.shape[1])), _Rows(k, pk), _Rows(v, pv)
        saved: list[Tensor] = []
        for bucket in layout.buckets(q.device):
            qb = _query_heads(qx.queries(bucket), layout)
            kb, vb = _key_heads(kx.keys(bucket), layout), _key_heads(vx.keys(bucket), layout)
            scored = _scored(qb, kb, bucket, scores)
            _scatter(out, torch.bmm(scored.softmax(-1).to(q.dtype), vb), bucket, layout)
            if with_sums:
                _scatter(sums, scored.logsumexp(-1, keepdim=True), bucket, layout)
            saved += [qb, kb, vb]
        ctx.save_for_backward(pk, *saved)
        ctx.layout, ctx.scores, ctx.rows = layout, scores, len(k)  # type: ignore[attr-defined]
        return (out, sums) if with_sums else out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, grad_sums: Tensor | None = None) -> tuple[Tensor | None, ...]:
        pk, *saved = ctx.saved_tensors  # type: ignore[attr-defined]
        layout, scores, rows = ctx.layout, ctx.scores, ctx.rows  # type: ignore[attr-defined]
        grad_x = _Rows(grad, pk.new_zeros(len(pk), grad.shape[1]))
        sums_x = None if grad_sums is None else _Rows(grad_sums, grad_sums.new_zeros(len(pk), layout.heads))
        width = pk.shape[1]
        dq = torch.zeros_like(grad)
        dk, dv = grad.new_zeros(rows, width), grad.new_zeros(rows, width)
        wide = torch.promote_types(grad.dtype, torch.float32)
        dpk, dpv = pk.new_zeros(pk.shape, dtype=wide), pk.new_zeros(pk.shape, dtype=wide)
        for i, bucket in enumerate(layout.buckets(grad.device)):
            qb, kb, vb = saved[3 * i : 3 * i + 3]
            scored = _scored(qb, kb, bucket, scores)  # again: they grow with the square of the length
            weights = scored.softmax(-1).to(qb.dtype)
            dout = _query_heads(grad_x.queries(bucket), layout)
            dvb = torch.bmm(weights.transpose(1, 2), dout)
            dw = torch.bmm(dout, vb.transpose(1, 2)).to(wide)
            p = weights.to(wide)
            inner = (p * dw).sum(-1, keepdim=True)
            if sums_x is not None:
                inner = inner - _query_heads(sums_x.queries(bucket), layout)
            ds = p * (dw - inner) * scores.scaling
            if scores.cap is not None:
                ds *= torch.where(scored.isinf(), 0, 1 - (scored / scores.cap).square())  # of a bias there is none then
            ds = ds.to(qb.dtype)
            _scatter(dq, torch.bmm(ds, kb), bucket, layout)
            dkb = torch.bmm(ds.transpose(1, 2), qb)
            for into, prefix_into, part in ((dk, dpk, dkb), (dv, dpv, dvb)):
                _scatter_keys(into, prefix_into, part, bucket, layout)
        return dq, dk, dv, dpk.to(pk.dtype), dpv.to(pk.dtype), None, None, None


class _Rows:
    """Batch rows, prefix rows and one zero row, as buckets index them; joined when a bucket first needs to."""

    def __init__(self, x: Tensor, prefix: Tensor) -> None:
        self._x, self._prefix = x, prefix
        self._joined: Tensor | None = None

    def queries(self, bucket: Bucket) -> Tensor:
        """[b, L, D]; where a bucket has prefix or padding rows, what stands there is never used."""
        return self._gather(bucket, bucket.queries)

    def keys(self, bucket: Bucket) -> Tensor:
        """[b, L, D], prefix rows first, zeros as padding."""
        return self._gather(bucket, bucket.keys)

    def _gather(self, bucket: Bucket, index: Tensor) -> Tensor:
        if bucket.first_row is not None:
            return _adjacent(self._x, bucket)
        if self._joined is None:
            zero = self._x.new_zeros(1, self._x.shape[1])
            self._joined = torch.cat([self._x, self._prefix.to(self._x.dtype), zero])
        return self._joined[index]


def _adjacent(x_TD: Tensor, bucket: Bucket) -> Tensor:
    """View of a bucket's rows that need no gathering, [b, L, D]."""
    assert bucket.first_row is not None
    rows = x_TD.narrow(0, bucket.first_row, len(bucket.sequences) * bucket.length)
    return torch.unflatten(rows, 0, (-1, bucket.length))


def _query_heads(x_bLE: Tensor, layout: Layout) -> Tensor:
    """[b * kv_heads, group * L, head_dim]: a key head meets its whole group of query heads in one matmul."""
    b, length, _ = x_bLE.shape
    grouped = x_bLE.view(b, length, layout.kv_heads, layout.heads // layout.kv_heads, -1).permute(0, 2, 3, 1, 4)
    return grouped.reshape(b * layout.kv_heads, layout.heads // layout.kv_heads * length, -1)


def _key_heads(x_bLC: Tensor, layout: Layout) -> Tensor:
    """[b * kv_heads, L, head_dim]."""
    b, length, _ = x_bLC.shape
    return x_bLC.view(b, length, layout.kv_heads, -1).transpose(1, 2).reshape(b * layout.kv_heads, length, -1)


def _scored(q: Tensor, k: Tensor, bucket: Bucket, scores: Scores) -> Tensor:
    scored = torch.bmm(q * scores.scaling, k.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32))
    if scores.cap is not None:
        scored = scored.div_(scores.cap).tanh_().mul_(scores.cap)
    by_sequence = scored.view(len(bucket.sequences), -1, bucket.length, bucket.width)
    if scores.bias is not None:
        by_sequence.add_(scores.bias[:, : bucket.length, : bucket.width])
    by_sequence.masked_fill_(bucket.hidden(scores.window).unsqueeze(-3), float("-inf"))
    return scored


def _scatter(out_TE: Tensor, heads_out: Tensor, bucket: Bucket, layout: Layout) -> None:
    """Write the real query rows of a bucket back to their batch rows."""
    b, kv_heads = len(bucket.sequences), layout.kv_heads
    grouped = heads_out.view(b, kv_heads, layout.heads // kv_heads, bucket.length, -1).permute(0, 3, 1, 2, 4)
    if bucket.first_row is not None:
        _adjacent(out_TE, bucket).view(grouped.shape).copy_(grouped)
        return
    out_TE[bucket.rows] = grouped.reshape(b * bucket.length, -1)[bucket.real]


def _scatter_keys(out_TC: Tensor, prefix_PC: Tensor, part: Tensor, bucket: Bucket, layout: Layout) -> None:
    """Write key rows back to their batch rows and add prefix rows to the stack's, sequence by sequence."""
    rows = part.view(len(bucket.sequences), layout.kv_heads, bucket.width, -1).transpose(1, 2)
    if bucket.first_row is not None:
        _adjacent(out_TC, bucket).view(rows.shape).copy_(rows)
        return
    for x, s in zip(rows.flatten(2), bucket.sequences, strict=True):
        start, count = s.keys
        out_TC[start : start + count] = x[s.prefix_length : s.prefix_length + count]
        if s.prefix_length:
            prefix_PC[s.prefix_first : s.prefix_first + s.prefix_length] += x[: s.prefix_length]
