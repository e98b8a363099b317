"""The affine op on a GPU: one launch for any number of grafts, one more for the vectors' gradients."""

from __future__ import annotations

from collections import defaultdict

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.affine.programs import affine_kernel, sums_kernel
from polygraft.kernels.common.segments import Segments

HEIGHT, WIDTH = 16, 128  # of a tile


def affine(y_TD: Tensor, g_JD: Tensor | None, b_JD: Tensor | None, segments: Segments) -> Tensor:
    """As `op.affine`, on tensors of one GPU (or of the CPU under TRITON_INTERPRET=1)."""
    with torch.cuda.device_of(y_TD):  # type: ignore[no-untyped-call]  # autograd itself guards the backward
        return _Affine.apply(y_TD, g_JD, b_JD, segments)  # type: ignore[no-any-return,no-untyped-call]


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, g: Tensor | None, b: Tensor | None, segments: Segments) -> Tensor:
        ctx.save_for_backward(y if g is not None else None, g, b)  # type: ignore[arg-type]  # None is allowed
        ctx.segments = segments  # type: ignore[attr-defined]
        return _affine(y, g, b, segments)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, g, b = ctx.saved_tensors  # type: ignore[attr-defined]
        segments: Segments = ctx.segments  # type: ignore[attr-defined]
        dg, db = _sums(grad, y, g, b, segments)
        return grad if g is None else _affine(grad, g, None, segments), dg, db, None


def _affine(y: Tensor, g: Tensor | None, b: Tensor | None, segments: Segments) -> Tensor:
    """y g + b on the segments' rows, as a new tensor."""
    like = g if g is not None else b
    assert like is not None
    y = y if y.stride(1) == 1 else y.contiguous()
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    affine_kernel[_grid(len(y), y.shape[1])](
        y,
        y if g is None else g.contiguous(),
        y if b is None else b.contiguous(),
        out,
        segments.index_T(len(y), len(like), y.device),
        len(y),
        y.shape[1],
        len(like),
        y.stride(0),
        HEIGHT=HEIGHT,
        WIDTH=WIDTH,
        SCALE=g is not None,
        SHIFT=b is not None,
        ACC=_type(like),
    )
    return out


def _sums(
    grad: Tensor, y: Tensor | None, g: Tensor | None, b: Tensor | None, segments: Segments
) -> tuple[Tensor | None, Tensor | None]:
    """(dg, db); rows of the stack that no segment names are 0."""
    like = g if g is not None else b
    assert like is not None
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    seen = grad if y is None else y if y.stride(1) == 1 else y.contiguous()
    dg = None if g is None else torch.zeros_like(g, memory_format=torch.contiguous_format)
    db = None if b is None else torch.zeros_like(b, memory_format=torch.contiguous_format)
    groups, spans = _groups(segments, grad.device)
    sums_kernel[len(groups), triton.cdiv(grad.shape[1], WIDTH)](
        grad,
        seen,
        grad if dg is None else dg,
        grad if db is None else db,
        groups,
        spans,
        grad.shape[1],
        grad.stride(0),
        seen.stride(0),
        HEIGHT=HEIGHT,
        WIDTH=WIDTH,
        SCALE=dg is not None,
        SHIFT=db is not None,
        ACC=_type(like),
    )
    return dg, db


def _groups(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor]:
    """(stack row, first span, last span) of every graft present, and the (start, stop) of all spans; kept."""
    return segments.derived(("affine", device), lambda: _grouped(segments, device))


def _grouped(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor]:
    by_graft: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for s in segments:
        by_graft[s.first].append((s.start, s.stop))
    groups: list[tuple[int, int, int]] = []
    spans: list[tuple[int, int]] = []
    for first, own in by_graft.items():
        groups.append((first, len(spans), len(spans) + len(own)))
        spans += own
    return torch.tensor(groups).to(device), torch.tensor(spans).to(device)


def _grid(rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(rows, HEIGHT), triton.cdiv(width, WIDTH)


def _type(vector: Tensor) -> tl.dtype:
    """The vectors' precision, in which products and sums are taken."""
    return tl.float64 if vector.dtype == torch.float64 else tl.float32
