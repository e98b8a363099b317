"""LoRA of which each step trains another random part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from zlib import crc32

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.ranges import Alpha, Dropout, Projections, Rank
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor


def dylora(
    r: Rank = 8, alpha: Alpha = 16.0, at: Projections = "linear", dropout: Dropout = 0.0, served: int = 0
) -> tuple[Slot, ...]:
    """LoRA that is trained at all ranks at once: every step draws b from 1 to r and computes with the first b ranks and
    the scale alpha / b, so that the graft may be served at any of them (Valipour et al. 2022, arXiv 2210.07558, eq. 7).

    `served` is the rank to serve and evaluate at; 0: all.

    Deviations: All first b ranks learn, where the paper can train the b-th alone (its "frozen" variant, eq. 10); b is
    uniform.

    Choose when: the rank is to be chosen after training, by what serving allows.
    """
    if not 0 <= served <= r:
        raise SpecError(f"peft: dylora.served: {served} is not a rank from 1 to {r}, or 0 for all")
    form = DeclRef("dylora", (("served", served or r),))
    return (Branch(at=at, rank=r, scale=alpha / max(r, 1), dropout=dropout, form=form),)


def lora_dropout(r: Rank = 8, alpha: Alpha = 16.0, at: Projections = "linear", p: float = 0.5) -> tuple[Slot, ...]:
    """LoRA of which every step drops columns of A and rows of B [out, r], each with probability p (Lin et al. 2024,
    arXiv 2404.09610, eq. 2 and 3).

    Deviations: A step draws one pair of masks a site and divides both by 1 - p, so that the product that is served is
    the mean over all masks. The paper does not divide, trains on the mean loss under several masks (its eq. 7) and
    serves the mean of the outputs under several (eq. 8).

    Choose when: LoRA overfits a small data set and dropout on x does not help.
    """
    if not 0 <= p < 1:
        raise SpecError(f"peft: lora-dropout.p: {p} is outside [0, 1)")
    return (Branch(at=at, rank=r, scale=alpha / max(r, 1), form=DeclRef("lora-dropout", (("p", p),))),)


def _own(slot: Branch, place: SiteShape, **_: object) -> Mapping[str, TensorDecl]:
    return {"A": TensorDecl((slot.rank, place.d_in), "kaiming"), "B": TensorDecl((slot.rank, place.d_out))}


def _first(slot: Branch, values: Mapping[str, Tensor], lowering: Lowering, served: int) -> Mapping[str, Tensor]:
    from torch.nn.functional import pad

    active = served if lowering.draw is None else lowering.draw % slot.rank + 1
    rest = (0, 0, 0, slot.rank - active)
    return {"A": pad(values["A"][:active] * (slot.rank / active), rest), "B": pad(values["B"][:active], rest)}


def _masked(slot: Branch, values: Mapping[str, Tensor], lowering: Lowering, p: float) -> Mapping[str, Tensor]:
    import torch

    if lowering.draw is None:
        return {"A": values["A"], "B": values["B"]}
    place = lowering.place
    seed = crc32(f"{lowering.draw}/{place.layer}.{place.name}".encode())
    kept = torch.rand(place.d_in + place.d_out, generator=torch.Generator().manual_seed(seed)) >= p
    columns, rows = kept.to(values["A"].device).split_with_sizes([place.d_in, place.d_out])
    scaled = {part: value / (1 - p) for part, value in values.items()}
    return {"A": scaled["A"].masked_fill(~columns, 0.0), "B": scaled["B"].masked_fill(~rows, 0.0)}


METHODS = (
    Method("dylora", "arXiv 2210.07558", 3e-4, dylora),
    Method("lora-dropout", "arXiv 2404.09610", 3e-4, lora_dropout),
)
PARAMETRIZATIONS = (Parametrization("dylora", _first, _own), Parametrization("lora-dropout", _masked, _own))
