"""Batched matmuls whose members depend on themselves alone: on no other member, nor on where they lie in memory.

Row invariance on CPU rests on them (docs/architecture.md). oneDNN, which computes bf16, mostly keeps it by itself. But
torch asks it only for products above a size that counts the whole batch, so smaller members go one by one; and it
may split long sums over threads when there are few members (seen with AMX from 576 terms on), so do long ones. MKL,
which computes float32, does not: a batch of one takes another kernel than a batch of two, and where rows are no
multiple of 64 bytes the rounding changes with the address. (Attention, all of whose sizes are multiples of 16 but the
head's, is spared.) Float64 is held to a tolerance, not to bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from polygraft.kernels.common.sums import LONG

_ONEDNN_FROM = 16**3  # torch's own threshold, on batch * M * K * P


def segment_bmm(a_NMK: Tensor, b_NKP: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a @ b, [N, M, P]; in float32 one oneDNN product a member."""
    if not _apart(a_NMK):
        if len(a_NMK) == 1 or not _one_by_one(a_NMK, b_NKP):
            return torch.bmm(a_NMK, b_NKP, out=out)
        out = _like(a_NMK, b_NKP) if out is None else out
        for into, a, b in _members(out, a_NMK, b_NKP):
            torch.bmm(a, b, out=into)
        return out
    out = _like(a_NMK, b_NKP) if out is None else out
    for into, a, b in zip(out, a_NMK, b_NKP):
        into.copy_(torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], ""))
    return out


def add_segment_bmm_(into_NMP: Tensor, a_NMK: Tensor, b_NKP: Tensor) -> None:
    """into += a @ b in place; below float32 the sum is rounded once."""
    if _apart(a_NMK):
        into_NMP.add_(segment_bmm(a_NMK, b_NKP))
    elif len(a_NMK) == 1 or not _one_by_one(a_NMK, b_NKP):
        into_NMP.baddbmm_(a_NMK, b_NKP)
    else:
        for into, a, b in _members(into_NMP, a_NMK, b_NKP):
            into.baddbmm_(a, b)


def _apart(a: Tensor) -> bool:
    return a.is_cpu and a.dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def _one_by_one(a: Tensor, b: Tensor) -> bool:
    """Whether a bf16 member alone would not reach oneDNN, or has sums so long that it may be given other ones."""
    return a.shape[1] * a.shape[2] * b.shape[2] <= _ONEDNN_FROM or (a.is_cpu and a.shape[2] >= LONG)


def _like(a: Tensor, b: Tensor) -> Tensor:
    """An empty product."""
    return a.new_empty(len(a), a.shape[1], b.shape[2])


def _members(*batches: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Batches of one."""
    return (tuple(batch[i : i + 1] for batch in batches) for i in range(len(batches[0])))
