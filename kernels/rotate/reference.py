"""Ground truth of the rotate op: the whole [width, width] matrix of every segment, in float32 (float64 stays
float64)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from polygraft.kernels.common.segments import Segments
from polygraft.kernels.rotate.rotation import Rotation


def rotate(x_TD: Tensor, operands: Mapping[str, Tensor], rotation: Rotation, segments: Segments) -> Tensor:
    """x[s] <- x[s] R_s, differentiable by autograd."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    out = x_TD.to(wide)
    for s in segments:
        own = {name: operand[s.first : s.last].to(wide) for name, operand in operands.items()}
        rows = out[s.start : s.stop] @ matrix(own, rotation, x_TD.shape[1])
        out = torch.cat([out[: s.start], rows, out[s.stop :]])
    return out.to(x_TD.dtype)


def matrix(own: Mapping[str, Tensor], rotation: Rotation, width: int) -> Tensor:
    """R [width, width] of one graft."""
    one = torch.eye(width, dtype=next(iter(own.values())).dtype)
    if rotation.kind == "lowrank":
        return one + own["A"].T @ own["B"]
    if rotation.kind == "pairs":
        half = rotation.size // 2
        J = torch.kron(torch.eye(width // (2 * half)), torch.eye(2 * half).roll(half, 1) * _signs(half)).to(one)
        return one * own["c"][0] + J * own["s"][0]
    block, stages = rotation.size, rotation.stages
    result = one
    for stage in reversed(range(stages)):
        D = own["D"].view(stages, -1, block, block)[stage]
        P = one[_order(width, block, stage)]
        inner = one.clone()
        for k, square in enumerate(D):
            inner[k * block : (k + 1) * block, k * block : (k + 1) * block] += square
        result = result @ P @ inner @ P.T
    return result


def _signs(half: int) -> Tensor:
    """y J = (-y2, y1) for y = (y1, y2)."""
    return torch.cat([torch.ones(half, 1), -torch.ones(half, 1)])


def _order(width: int, block: int, stage: int) -> list[int]:
    """The place in the stage of every channel: in chunks of block * 2^stage, even half blocks before the odd ones."""
    if stage == 0:
        return list(range(width))
    chunk, half = block << stage, block // 2
    order: list[int] = []
    for start in range(0, width, chunk):
        halves = [list(range(at, at + half)) for at in range(start, start + chunk, half)]
        for piece in halves[0::2] + halves[1::2]:
            order += piece
    return order
