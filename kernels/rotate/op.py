"""The rotate op: x[s] <- x[s] R_s over segments s, with R_s [D, D] given by blocks, as identity plus low rank, or by
pairs of channels (OFT, BOFT; HRA; RoAd)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.branch.op import branch
from polygraft.kernels.common.segments import Segments
from polygraft.kernels.rotate.order import butterfly
from polygraft.kernels.rotate.rotation import Rotation


def rotate(x_TD: Tensor, operands: Mapping[str, Tensor], rotation: Rotation, segments: Segments) -> Tensor:
    """Semantics: out[s.start:s.stop] = x[s.start:s.stop] R with R made from the operands at [s.first, s.last); other
    rows pass unchanged.

    `lowrank`: R = 1 + A^T B, A and B [r, D]. `pairs`: x c + (-x2, x1) s, where x1 and x2 are the halves of every group
    of `size` channels; c and s [1, D]. `blocks`: R = S_(m-1) ... S_0 of m `stages`, each stage S_i = P_i (1 + D_i)
    P_i^T with D_i block-diagonal; D [m D, size] holds the blocks stage by stage, P_i is `butterfly`'s order (P_0 = 1).

    Operands are in float32 (float64 beside float64), and so is the arithmetic; the result is rounded to x's dtype.
    On a GPU blocks multiply float32 as three tf32 products.
    Segments must not overlap. Differentiable; the operands' gradients sum over their own segment's rows only.
    """
    if not segments.items:
        return x_TD
    if x_TD.is_cuda and rotation.kind == "blocks":
        from polygraft.kernels.rotate import gpu  # Triton is loaded only where there is a GPU

        return gpu.blocks(x_TD, operands["D"], segments, rotation.size, rotation.stages)
    wide = x_TD.to(next(iter(operands.values())).dtype)
    if rotation.kind == "lowrank":
        wide = branch(wide, wide, operands["A"], operands["B"], segments, "identity")
    elif rotation.kind == "pairs":
        wide = _Pairs.apply(wide, operands["c"], operands["s"], segments, rotation.size)  # type: ignore[no-untyped-call]
    else:
        for stage in reversed(range(rotation.stages)):
            order = butterfly(x_TD.shape[1], rotation.size, stage)
            wide = _Blocks.apply(wide, operands["D"], segments, order, (stage, rotation.stages))  # type: ignore[no-untyped-call]
    return wide.to(x_TD.dtype)


class _Blocks(torch.autograd.Function):
    """One stage. A segment's operands are copied to memory of its own: where rows are short, products of float32 round
    by the address."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, D: Tensor, segments: Segments, order: Tensor, stage: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, D, order)
        ctx.work = segments, stage  # type: ignore[attr-defined]
        out = x.clone()
        for s in segments:
            blocks = _of_stage(D[s.first : s.last], stage).clone()
            turned = torch.bmm(_gathered(x[s.start : s.stop], order, D.shape[1]), blocks)
            out[s.start : s.stop] += _scattered(turned, order)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, D, order = ctx.saved_tensors  # type: ignore[attr-defined]
        segments, stage = ctx.work  # type: ignore[attr-defined]
        dx, dD = grad.clone(), torch.zeros_like(D)
        for s in segments:
            blocks = _of_stage(D[s.first : s.last], stage).clone()
            dy = _gathered(grad[s.start : s.stop], order, D.shape[1])
            rows = _gathered(x[s.start : s.stop], order, D.shape[1])
            dx[s.start : s.stop] += _scattered(torch.bmm(dy, blocks.mT), order)
            _of_stage(dD[s.first : s.last], stage).add_(torch.bmm(rows.mT, dy))
        return dx, dD, None, None, None


class _Pairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, c: Tensor, s: Tensor, segments: Segments, group: int) -> Tensor:
        ctx.save_for_backward(x, c, s)
        ctx.work = segments, group  # type: ignore[attr-defined]
        out = x.clone()
        for one in segments:
            rows = x[one.start : one.stop]
            out[one.start : one.stop] = rows * c[one.first] + _quarter(rows, group) * s[one.first]
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, c, s = ctx.saved_tensors  # type: ignore[attr-defined]
        segments, group = ctx.work  # type: ignore[attr-defined]
        dx, dc, ds = grad.clone(), torch.zeros_like(c), torch.zeros_like(s)
        for one in segments:
            rows, dy = x[one.start : one.stop], grad[one.start : one.stop]
            dx[one.start : one.stop] = dy * c[one.first] - _quarter(dy * s[one.first], group)
            dc[one.first] += (dy * rows).sum(0)
            ds[one.first] += (dy * _quarter(rows, group)).sum(0)
        return dx, dc, ds, None, None


def _of_stage(D_RB: Tensor, stage: tuple[int, int]) -> Tensor:
    """View of one stage's blocks, [n, b, b]."""
    return D_RB.view(stage[1], -1, D_RB.shape[1], D_RB.shape[1])[stage[0]]


def _gathered(x_MD: Tensor, order_D: Tensor, block: int) -> Tensor:
    """x P by block, [n, M, b]: channel k at place order[k]."""
    placed = torch.empty_like(x_MD)
    placed[:, order_D] = x_MD
    return placed.view(len(x_MD), x_MD.shape[1] // block, block).transpose(0, 1).contiguous()


def _scattered(y_NMB: Tensor, order_D: Tensor) -> Tensor:
    """y P^T, [M, D]."""
    return y_NMB.transpose(0, 1).flatten(1)[:, order_D]


def _quarter(x_MD: Tensor, group: int) -> Tensor:
    """Every pair (x1, x2) turned by 90 degrees, (-x2, x1)."""
    halves = x_MD.reshape(len(x_MD), x_MD.shape[1] // group, 2, group // 2)
    return torch.stack([-halves[:, :, 1], halves[:, :, 0]], dim=2).view(x_MD.shape)
