"""The rotate op's blocks on a GPU: a launch a stage. Rows are widened as they are read, and float32 is multiplied as
three products of its tf32 parts, which tensor cores take (relative error about 2^-21)."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from polygraft.kernels.common.gpu import adjacent
from polygraft.kernels.common.launches import EntryLaunches
from polygraft.kernels.common.segments import Segments
from polygraft.kernels.rotate.order import butterfly
from polygraft.kernels.rotate.programs import squares_kernel, turn_kernel

HEIGHT = 32  # rows of one product in the sums of squares
WIDTHS = (16, 32)  # columns of a block in a tile; 16 is the least that tensor cores multiply, 64 spill registers


def blocks(x_TD: Tensor, D_RB: Tensor, segments: Segments, block: int, stages: int) -> Tensor:
    """As `op.rotate` of kind blocks, on tensors of one GPU (or of the CPU under TRITON_INTERPRET=1)."""
    assert segments.disjoint and D_RB.shape[1] == block, (D_RB.shape, block)
    out = x_TD
    with torch.cuda.device_of(x_TD):  # type: ignore[no-untyped-call]  # autograd itself guards the backward
        for stage in reversed(range(stages)):
            dtype = x_TD.dtype if stage == 0 else D_RB.dtype
            out = _Stage.apply(out, D_RB, segments, stage, dtype)  # type: ignore[no-untyped-call]
    return out


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, D: Tensor, segments: Segments, stage: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, D)
        ctx.segments, ctx.stage = segments, stage  # type: ignore[attr-defined]
        return _turned(x, D, EntryLaunches.of(segments, x.device), stage, dtype, transposed=False)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, D = ctx.saved_tensors  # type: ignore[attr-defined]
        needs, stage = ctx.needs_input_grad, ctx.stage  # type: ignore[attr-defined]
        plan = EntryLaunches.of(ctx.segments, x.device)  # type: ignore[attr-defined]
        dx = _turned(grad, D, plan, stage, x.dtype, transposed=True) if needs[0] else None
        return dx, _squares(x, grad, D, plan, stage) if needs[1] else None, None, None, None


def _turned(x: Tensor, D: Tensor, plan: EntryLaunches, stage: int, dtype: torch.dtype, *, transposed: bool) -> Tensor:
    """x + x P D P^T on the segments' rows, in `dtype`."""
    x, block, width = adjacent(x), D.shape[1], _width(D)
    out = x.to(dtype, copy=True).contiguous()
    for grid in plan.batch:
        turn_kernel[len(grid.tiles), x.shape[1] // block * triton.cdiv(block, width)](
            x,
            D.contiguous(),
            out,
            _channels(x.shape[1], block, stage, x.device),
            plan.table,
            grid.tiles,
            x.stride(0),
            out.stride(0),
            block,
            stage * x.shape[1],
            HEIGHT=grid.height,
            WIDTH=width,
            TRANSPOSED=transposed,
            **_arithmetic(D),
        )
    return out


def _squares(x: Tensor, grad: Tensor, D: Tensor, plan: EntryLaunches, stage: int) -> Tensor:
    """The gradient of one stage's blocks; 0 elsewhere."""
    x, grad, block, width = adjacent(x), adjacent(grad), D.shape[1], _width(D)
    out = torch.zeros_like(D, memory_format=torch.contiguous_format)
    for own, _ in plan.stack:
        squares_kernel[len(own), x.shape[1] // block * triton.cdiv(block, width) ** 2](
            x,
            grad,
            out,
            _channels(x.shape[1], block, stage, x.device),
            own,
            plan.table,
            x.stride(0),
            grad.stride(0),
            block,
            stage * x.shape[1],
            HEIGHT=HEIGHT,
            WIDTH=width,
            **_arithmetic(D),
        )
    return out


@cache
def _channels(width: int, block: int, stage: int, device: torch.device) -> Tensor:
    """The channel at every place of a stage, `butterfly`'s inverse."""
    return butterfly(width, block, stage).argsort().to(device)


def _width(D: Tensor) -> int:
    return next((width for width in WIDTHS if D.shape[1] <= width), WIDTHS[-1])


def _arithmetic(D: Tensor) -> dict[str, object]:
    if D.dtype == torch.float64:
        return {"ACC": tl.float64, "PRECISION": "ieee"}
    return {"ACC": tl.float32, "PRECISION": "tf32x3"}
