"""Batched matmuls whose members depend on themselves alone: on no other member, nor on where they lie in memory.

Row invariance on CPU rests on them (docs/architecture.md). oneDNN, which computes bf16, mostly keeps it by itself. But
torch asks it only for products above a size that counts the whole batch, so smaller members go one by one; and it
may split long sums over threads when there are few members (seen with AMX from 576 terms on), so those are multiplied
by four, a number that is always the same. MKL,
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
_COUNT = 4  # members of a product with long sums
_LARGE = 1 << 23  # M * K * P from which such a product of one member beats one of four


def segment_bmm(a_NMK: Tensor, b_NKP: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a @ b, [N, M, P]; in float32 one oneDNN product a member."""
    form = _form(a_NMK, b_NKP)
    if form == "all":
        return torch.bmm(a_NMK, b_NKP, out=out)
    out = a_NMK.new_empty(len(a_NMK), a_NMK.shape[1], b_NKP.shape[2]) if out is None else out
    for into, a, b in _members(_COUNT if form == "four" else 1, out, a_NMK, b_NKP):
        match form:
            case "one":
                torch.bmm(a, b, out=into)
            case "four":
                into.copy_(torch.bmm(_filled(a), _filled(b))[: len(a)])
            case "linear":
                into[0].copy_(torch.ops.mkldnn._linear_pointwise(a[0], b[0].T, None, "none", [], ""))
    return out


def add_segment_bmm_(into_NMP: Tensor, a_NMK: Tensor, b_NKP: Tensor) -> None:
    """into += a @ b in place; below float32 the sum is rounded once, but for a short product with long sums."""
    match _form(a_NMK, b_NKP):
        case "all":
            into_NMP.baddbmm_(a_NMK, b_NKP)
        case "one":
            for into, a, b in _members(1, into_NMP, a_NMK, b_NKP):
                into.baddbmm_(a, b)
        case _:
            into_NMP.add_(segment_bmm(a_NMK, b_NKP))


def _form(a: Tensor, b: Tensor) -> str:
    """How members are multiplied, which is a function of their shape: all in one product, one by one, by four, or one
    by one as a linear."""
    if a.is_cpu and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "linear"
    work = a.shape[1] * a.shape[2] * b.shape[2]
    if a.is_cpu and a.dtype == torch.bfloat16 and a.shape[2] >= LONG:
        return "four" if _ONEDNN_FROM < work < _LARGE else "one"
    return "one" if work <= _ONEDNN_FROM and len(a) > 1 else "all"


def _filled(x_NAB: Tensor) -> Tensor:
    """x with members of any values to make `_COUNT`, laid out in memory as x is."""
    if len(x_NAB) == _COUNT:
        return x_NAB
    if x_NAB.stride(2) != 1:
        return _filled(x_NAB.transpose(1, 2)).transpose(1, 2)
    filled = x_NAB.new_empty(_COUNT, x_NAB.shape[1], x_NAB.stride(1))[..., : x_NAB.shape[2]]
    filled[: len(x_NAB)] = x_NAB
    return filled


def _members(count: int, *batches: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Batches of at most `count`."""
    return zip(*(torch.split(batch, count) for batch in batches), strict=True)
