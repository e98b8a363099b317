"""The sparse op: y[s] += x[s] S_s^T over segments s, S_s given by some of its entries or some of its rows (SHiRA,
FishMask, PaFi; moved rows)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.common.matmul import add_segment_bmm_, segment_bmm
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.sparse.order import SparseIndex

_PIECE = 1 << 21  # gathered numbers at a time


def sparse(x_TI: Tensor, y_TO: Tensor, v_NK: Tensor, index: SparseIndex, segments: Segments) -> Tensor:
    """Semantics: out = y; for every k in s.first ... s.last, with v and i = index.places at k:
    entries: out[s.start:s.stop, i[0]] += s.scale * v[0] * x[s.start:s.stop, i[1]];
    rows: out[s.start:s.stop, i[0]] += s.scale * x[s.start:s.stop] @ v.

    x [T, in] and y [T, out] of one dtype. Entries: v [N, 1], i [N, 2] int64 (row, column); rows: v [N, in], i [N, 1].
    v in float32 or wider; the sums of entries are in its precision and rounded once, rows are rounded to x's dtype.
    Segments may overlap. Differentiable in x, y and v; sums run over one segment alone, in the order of k.
    """
    if not segments.items:
        return y_TO
    if x_TI.is_cuda:
        from polygraft.kernels.sparse import gpu  # Triton is loaded only where there is a GPU

        return gpu.sparse(x_TI, y_TO, v_NK, index, segments)
    return _Sparse.apply(x_TI, y_TO, v_NK, index, segments)  # type: ignore[no-any-return,no-untyped-call]


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, y: Tensor, v: Tensor, index: SparseIndex, segments: Segments) -> Tensor:
        ctx.save_for_backward(x, v)
        ctx.segments, ctx.index = segments, index  # type: ignore[attr-defined]
        i, out = index.places, y.clone()
        for s in _whole(segments):
            rows, own, place = x[s.start : s.stop], v[s.first : s.last], i[s.first : s.last]
            if i.shape[1] == 1:
                product = segment_bmm(rows[None], own.to(x.dtype).T[None])[0]
                out[s.start : s.stop].index_add_(1, place[:, 0], product, alpha=s.scale)
            else:
                _add_entries_(out[s.start : s.stop], rows, own, place[:, 0], place[:, 1], s.scale)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, v = ctx.saved_tensors  # type: ignore[attr-defined]
        segments: Segments = ctx.segments  # type: ignore[attr-defined]
        i: Tensor = ctx.index.places  # type: ignore[attr-defined]
        dx, dv = torch.zeros_like(x), torch.zeros_like(v)
        for s in _whole(segments):
            dy, own, place = grad[s.start : s.stop], v[s.first : s.last], i[s.first : s.last]
            if i.shape[1] == 1:
                met = dy[:, place[:, 0]]
                add_segment_bmm_(dx[None, s.start : s.stop], met[None], s.scale * own.to(x.dtype)[None])
                dv[s.first : s.last] += s.scale * segment_bmm(met.T[None], x[None, s.start : s.stop])[0].to(v.dtype)
            else:
                _add_entries_(dx[s.start : s.stop], dy, own, place[:, 1], place[:, 0], s.scale)
                dv[s.first : s.last] += s.scale * _products(x, grad, place, s, v.dtype)
        return dx, grad, dv, None, None


def _whole(segments: Segments) -> Iterator[Segment]:
    """Those with rows and with a part of the stack."""
    return (s for s in segments if s.rows and s.size)


def _add_entries_(into_MB: Tensor, from_MA: Tensor, v_N1: Tensor, to_N: Tensor, of_N: Tensor, scale: float) -> None:
    """into[:, to[k]] += scale * v[k] * from[:, of[k]], summed in v's dtype and added once.

    Transposed, so that what an entry meets lies together.
    """
    source = from_MA.T.to(v_N1.dtype)
    sums = source.new_zeros(into_MB.shape[1], len(into_MB))
    for piece in _pieces(len(v_N1), len(into_MB)):
        sums.index_add_(0, to_N[piece], source[of_N[piece]] * v_N1[piece])
    into_MB.copy_(into_MB + sums.T * scale)


def _products(x_TI: Tensor, grad_TO: Tensor, place_N2: Tensor, s: Segment, dtype: torch.dtype) -> Tensor:
    """sum over the segment's rows of grad[:, row] * x[:, column], [N, 1]."""
    a, b = x_TI[s.start : s.stop].T.to(dtype), grad_TO[s.start : s.stop].T.to(dtype)
    return torch.cat(
        [(b[place_N2[piece, 0]] * a[place_N2[piece, 1]]).sum(1, keepdim=True) for piece in _pieces(s.size, s.rows)]
    )


def _pieces(entries: int, rows: int) -> Iterator[slice]:
    step = max(1, _PIECE // rows)
    return (slice(first, first + step) for first in range(0, entries, step))
