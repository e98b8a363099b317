"""Any graft that changes projections' weights as a LoRA: the best low-rank B A of each dW, by its singular values
(Eckart & Young 1936)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats.check import FormatError, refuse_head
from polygraft.grafts.formats.plain import Rank, loras
from polygraft.grafts.merge import Fold
from polygraft.grafts.sites import Site


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA in place of a graft; `loss` is ||dW - B A|| / ||dW|| over all sites together (0: nothing was lost)."""

    graft: BoundGraft
    tensors: Mapping[str, Tensor]
    loss: float


def to_lora(
    graft: BoundGraft,
    values: Mapping[str, Tensor],
    weight: Callable[[Site], Tensor],
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> Lora:
    """The LoRA of `rank`, or of the smallest rank that keeps a share `energy` of every dW's squared norm.

    Exact, but for rounding, where no dW has a higher rank (VeRA). Computed in float64, tensors in float32. Raises
    SpecError for a graft that cannot be folded into weights, FormatError for one that changes biases, or arguments
    that name no rank.
    """
    if (rank is None) == (energy is None):
        raise FormatError("rank and energy: give one of the two")
    refuse_head(graft)
    if rank is not None and rank < 1:
        raise FormatError(f"rank: {rank} is not a size; give at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise FormatError(f"energy: {energy} is outside (0, 1]")
    fold = Fold(graft, {name: value.double() for name, value in values.items()}, lambda s: weight(s).double())
    found: dict[Site, tuple[Tensor, Tensor, Tensor]] = {}
    for site in fold.sites:
        merged = fold.at(site)
        if merged.bias is not None and bool(merged.bias.count_nonzero()):
            raise FormatError(
                f"{graft.spec.method!r} changes the bias of {site}, which a LoRA cannot; export merged weights"
            )
        found[site] = torch.linalg.svd(merged.weight - weight(site).double(), full_matrices=False)
    if rank is None:
        assert energy is not None
        rank = max(_rank(S, energy) for _, S, _ in found.values())
    chosen = loras(dict.fromkeys(found, Rank(rank, float(rank))), graft.shape)
    tensors: dict[str, Tensor] = {}
    for index, site in chosen.sites:
        U, S, Vh = found[site]
        kept = min(rank, len(S))
        root = S[:kept].sqrt()
        A, B = torch.zeros(rank, Vh.shape[1]), torch.zeros(rank, len(U))
        A[:kept], B[:kept] = root[:, None] * Vh[:kept], (U[:, :kept] * root).T
        tensors |= {f"{index}.{site}.A": A, f"{index}.{site}.B": B}
    whole, lost = (sum(float(S[cut:].square().sum()) for _, S, _ in found.values()) for cut in (0, rank))
    return Lora(chosen, tensors, sqrt(lost / whole) if whole else 0.0)


def _rank(S: Tensor, energy: float) -> int:
    """How many singular values hold the share; those that are only rounding count for nothing."""
    squares = torch.where(S[:1] * len(S) * torch.finfo(S.dtype).eps < S, S, 0).square()
    shares = squares.cumsum(0) / squares.sum().clamp(min=torch.finfo(S.dtype).tiny)
    return min(int((shares < energy - 1e-12).sum()) + 1, len(S))
