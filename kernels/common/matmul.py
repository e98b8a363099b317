"""Batched matmuls whose members depend on themselves alone: on no other member, nor on where they lie in memory.

Row invariance on CPU rests on them (docs/architecture.md). oneDNN, which computes bf16, keeps it by itself, but torch
asks it only for products above a size that counts the whole batch, so smaller members go one by one. MKL, which
computes float32, does not: a batch of one takes another kernel than a batch of two, and where rows are no multiple of
64 bytes the rounding changes with the address. (Attention, all of whose sizes are multiples of 16 but the head's, is
spared.) Float64 is held to a tolerance, not to bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ONEDNN_FROM = 16**3  # torch's own threshold, on batch * M * K * P


def segment_bmm(a_NMK: Tensor, b_NKP: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a @ b, [N, M, P]; in float32 one oneDNN product a member."""
    if not _apart(a_NMK):
        if len(a_NMK) == 1 or not _small(a_NMK, b_NKP):
            return torch.bmm(a_NMK, b_NKP, out=out)
        alone = [torch.bmm(a, b) for a, b in _members(a_NMK, b_NKP)]
        return torch.cat(alone) if out is None else out.copy_(torch.cat(alone))
    out = a_NMK.new_empty(len(a_NMK), a_NMK.shape[1], b_NKP.shape[2]) if out is None else out
    for into, a, b in zip(out, a_NMK, b_NKP):
        into.copy_(torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], ""))
    return out


def add_segment_bmm_(into_NMP: Tensor, a_NMK: Tensor, b_NKP: Tensor) -> None:
    """into += a @ b in place; below float32 the sum is rounded once."""
    if _apart(a_NMK):
        into_NMP.add_(segment_bmm(a_NMK, b_NKP))
    elif len(a_NMK) == 1 or not _small(a_NMK, b_NKP):
        into_NMP.baddbmm_(a_NMK, b_NKP)
    else:
        for into, a, b in _members(into_NMP, a_NMK, b_NKP):
            into.baddbmm_(a, b)


def _apart(a: Tensor) -> bool:
    return a.is_cpu and a.dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def _small(a: Tensor, b: Tensor) -> bool:
    """Whether one member alone would not reach oneDNN."""
    return a.shape[1] * a.shape[2] * b.shape[2] <= _ONEDNN_FROM


def _members(*batches: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Batches of one."""
    return (tuple(batch[i : i + 1] for batch in batches) for i in range(len(batches[0])))
