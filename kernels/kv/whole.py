"""Attention of whole sequences on a CPU in bf16, compiled: nothing is gathered, and what grows with the square of a
length lives a block of queries at a time.

Scores, softmax and sums are in float32, the softmax's weights and the slopes of the scores are rounded to bf16 before
they are multiplied. A sequence's numbers are a function of itself and its prefix alone: neither the sequences beside it
nor the number of threads has a part in their bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.compiled.calls import Function, computes, function, structure
from polygraft.kernels.kv.layout import Layout
from polygraft.kernels.kv.scores import Scores

_SOURCE = Path(__file__).with_name("whole.cpp")
_RAGGED = structure("Ragged", integers="start length key_start key_length prefix_first prefix_length part")
_WHOLE = structure(
    "Whole",
    pointers="q k v pk pv grad out dq dk dv dpk dpv sums grad_sums sequences",
    integers="count q_stride k_stride v_stride p_stride grad_stride out_stride dk_stride heads kv_heads head_dim "
    "causal window",
    numbers="scaling",
    integers_="threads",
)
_LANES = 16  # a head is whole vectors


def computes_heads(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether heads of this size are computed here, if their scores have neither a bias nor a cap."""
    like = torch.empty(0, dtype=dtype, device=device)
    return dtype == torch.bfloat16 and head_dim % _LANES == 0 and computes(like) and _function() is not None


def supports(tensors: Sequence[Tensor], layout: Layout, scores: Scores) -> bool:
    """Whether `attend` is for q, k and v like these, here: never a matter of a prefix, which the sequences beside may
    have."""
    return _compiled(tensors, layout, scores) is not None


def attend(  # noqa: PLR0913
    q_TE: Tensor, k_TC: Tensor, v_TC: Tensor, pk_PC: Tensor, pv_PC: Tensor, layout: Layout, scores: Scores
) -> tuple[Tensor, Tensor]:
    """What `op.attend_with_sums` says, without a bias or a cap of the scores. Rows may be a stride apart. Only where
    `supports` says so. Differentiable in all five, which alone are kept."""
    return _Whole.apply(q_TE, k_TC, v_TC, pk_PC, pv_PC, layout, scores)  # type: ignore[no-any-return,no-untyped-call]


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, layout: Layout, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        tensors = (q, k, v, *(x.to(q.dtype).contiguous() for x in (pk, pv)))
        ctx.save_for_backward(*(x.contiguous() for x in tensors))  # a view would keep all that lies beside it
        ctx.layout, ctx.scores, ctx.dtype = layout, scores, pk.dtype  # type: ignore[attr-defined]
        out = q.new_zeros(q.shape) if _ragged(layout).gaps else q.new_empty(q.shape)
        sums = q.new_full((len(q), layout.heads), float("-inf"), dtype=torch.float32)
        _call(tensors, layout, scores, out=out, out_stride=out.stride(0), sums=sums)
        return out, sums

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor | None, grad_sums: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
        q, k, v, pk, _ = tensors
        layout, scores, dtype = ctx.layout, ctx.scores, ctx.dtype  # type: ignore[attr-defined]
        grad = q.new_zeros(q.shape) if grad is None else grad
        grad = grad if grad.stride(1) == 1 and grad.stride(0) % 2 == 0 else grad.contiguous()
        ragged, width = _ragged(layout), pk.shape[1]
        dq, dk, dv = (x.new_zeros(x.shape) if ragged.gaps else x.new_empty(x.shape) for x in (q, k, v))
        parts = [pk.new_empty(ragged.parts, width, dtype=torch.float32) for _ in range(2)]
        written = {"grad": grad, "dq": dq, "dk": dk, "dv": dv, "dpk": parts[0], "dpv": parts[1]}
        if grad_sums is not None:
            written["grad_sums"] = grad_sums.contiguous()
        strides = {"grad_stride": grad.stride(0), "out_stride": dq.stride(0), "dk_stride": dk.stride(0)}
        _call(tensors, layout, scores, **written, **strides)
        asked = ctx.needs_input_grad[3:5]  # type: ignore[attr-defined]
        prefixes = (
            _summed(part, len(pk), layout).to(dtype) if own else None for part, own in zip(parts, asked, strict=True)
        )
        return dq, dk, dv, *prefixes, None, None


class _Ragged(NamedTuple):
    """A layout's sequences as whole.cpp reads them, the rows of all their prefixes together, and whether rows of
    queries or keys are in none of them."""

    items: ctypes.Array[ctypes.Structure]
    parts: int
    gaps: bool


def _ragged(layout: Layout) -> _Ragged:
    return layout.derived(_Ragged, lambda: _listed(layout))


def _listed(layout: Layout) -> _Ragged:
    items, part = (_RAGGED * len(layout.sequences))(), 0
    for item, s in zip(items, layout.sequences, strict=True):
        item.start, item.length, item.prefix_first, item.prefix_length, item.part = (
            *(s.start, s.length, s.prefix_first, s.prefix_length),
            part,
        )
        item.key_start, item.key_length = s.keys
        part += s.prefix_length
    keys = layout.rows if layout.key_rows is None else layout.key_rows
    covered = [sum(s.length for s in layout.sequences), sum(s.keys[1] for s in layout.sequences)]
    return _Ragged(items, part, covered != [layout.rows, keys])


def _summed(part: Tensor, rows: int, layout: Layout) -> Tensor:
    """The gradient of a prefix stack of so many rows: that of every sequence which uses it, one after the other."""
    total = part.new_zeros(rows, part.shape[1])
    first = 0
    for s in layout.sequences:
        if s.prefix_length:
            total[s.prefix_first : s.prefix_first + s.prefix_length] += part[first : first + s.prefix_length]
            first += s.prefix_length
    return total


def _call(tensors: Sequence[Tensor], layout: Layout, scores: Scores, **written: Tensor | int) -> None:
    compiled = _compiled(tensors, layout, scores)
    assert compiled is not None
    (q, k, v, pk, _), items = tensors, _ragged(layout).items
    compiled.ready(
        **dict(zip(("q", "k", "v", "pk", "pv"), tensors, strict=True)),
        **written,
        sequences=ctypes.addressof(items),
        count=len(items),
        q_stride=q.stride(0),
        k_stride=k.stride(0),
        v_stride=v.stride(0),
        p_stride=pk.stride(0),
        heads=layout.heads,
        kv_heads=layout.kv_heads,
        head_dim=q.shape[1] // layout.heads,
        causal=layout.causal,
        window=(scores.window or 0) if layout.causal else 0,
        scaling=scores.scaling,
        threads=torch.get_num_threads(),
    )()


def _compiled(tensors: Sequence[Tensor], layout: Layout, scores: Scores) -> Function | None:
    rows = tensors[:3]
    fits = all(x.dtype == torch.bfloat16 and x.stride(1) == 1 and x.stride(0) % 2 == 0 for x in rows)
    if not fits or rows[0].shape[1] // layout.heads % _LANES or scores.bias is not None or scores.cap is not None:
        return None
    return _function() if computes(*rows) else None


def _function() -> Function | None:
    return function(_SOURCE, "whole", _WHOLE, _RAGGED)
