"""Batched matmuls whose members depend on themselves alone: on no other member, nor on where they lie in memory.

Row invariance on CPU rests on them (docs/architecture.md). oneDNN, which computes bf16, keeps it by itself. MKL, which
computes float32, does not: a batch of one takes another kernel than a batch of two, and where rows are no multiple of
64 bytes the rounding changes with the address. Float64 is held to a tolerance, not to bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_bmm(a_NMK: Tensor, b_NKP: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a @ b, [N, M, P], for few members of any shape: in float32 one oneDNN product each."""
    if not _apart(a_NMK):
        return torch.bmm(a_NMK, b_NKP, out=out)
    out = a_NMK.new_empty(len(a_NMK), a_NMK.shape[1], b_NKP.shape[2]) if out is None else out
    for into, a, b in zip(out, a_NMK, b_NKP):
        into.copy_(torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], ""))
    return out


def add_segment_bmm_(into_NMP: Tensor, a_NMK: Tensor, b_NKP: Tensor) -> None:
    """into += a @ b in place; below float32 the sum is rounded once."""
    if _apart(a_NMK):
        into_NMP.add_(segment_bmm(a_NMK, b_NKP))
    else:
        into_NMP.baddbmm_(a_NMK, b_NKP)


def head_bmm(a_NMK: Tensor, b_NKP: Tensor) -> Tensor:
    """a @ b, [N, M, P], for many members with rows of whole 64 bytes (attention); a single one is computed twice."""
    if len(a_NMK) == 1 and a_NMK.is_cpu and a_NMK.dtype not in (torch.bfloat16, torch.float16):
        return torch.bmm(a_NMK.expand(2, -1, -1), b_NKP.expand(2, -1, -1))[:1]
    return torch.bmm(a_NMK, b_NKP)


def _apart(a: Tensor) -> bool:
    return a.is_cpu and a.dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
