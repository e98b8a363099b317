"""The nf4 op on a GPU: the branch's first product, then one launch that reads W at half a byte a weight."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from polygraft.kernels.branch.gpu import shrink
from polygraft.kernels.common.gpu import accumulator, adjacent
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.common.tiles import BranchTiles
from polygraft.kernels.nf4.cost import BLOCK
from polygraft.kernels.nf4.levels import LEVELS
from polygraft.kernels.nf4.programs import linear_kernel

FEATURES = 64


def linear(  # noqa: PLR0913
    x_TI: Tensor, codes_OH: Tensor, absmax_OK: Tensor, A_RI: Tensor, B_RO: Tensor, segments: Segments, act: str
) -> Tensor:
    """As `op.linear`, on tensors of one GPU (or of the CPU under TRITON_INTERPRET=1)."""
    plan = _tiles(segments, len(x_TI), x_TI.device)
    x = adjacent(x_TI)
    B = adjacent(B_RO)
    out = torch.empty(len(x), len(codes_OH), dtype=x.dtype, device=x.device)
    with torch.no_grad(), torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        hidden = shrink(x, A_RI, plan)
        levels = _levels(x.device)
        for grid in plan.expand:
            linear_kernel[len(grid.tiles), triton.cdiv(len(codes_OH), FEATURES)](
                x,
                codes_OH.contiguous(),
                absmax_OK.contiguous(),
                levels,
                hidden,
                B,
                out,
                plan.table,
                plan.scales,
                grid.tiles,
                x.stride(0),
                B.stride(0),
                x.shape[1],
                len(codes_OH),
                HEIGHT=grid.height,
                WIDTH=grid.width,
                FEATURES=FEATURES,
                BLOCK=BLOCK,
                ACT=act,
                ACC=accumulator(x.dtype),
            )
    return out


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device)


def _tiles(segments: Segments, rows: int, device: torch.device) -> BranchTiles:
    """The branch's tiles with a segment without ranks for the rows between segments; kept."""
    return segments.derived(("nf4", rows, device), lambda: BranchTiles.over(_whole(segments, rows), device))


def _whole(segments: Segments, rows: int) -> list[Segment]:
    items, end = [], 0
    for s in sorted((s for s in segments if s.rows and s.size), key=lambda s: s.start):
        assert end <= s.start, f"segments meet in row {s.start}"
        items += [Segment(end, s.start, 0, 0), s]
        end = s.stop
    items.append(Segment(end, rows, 0, 0))
    return [s for s in items if s.rows]
