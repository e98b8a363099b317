"""LoRAs whose factors are read out of one vector or bank of vectors that all sites share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.exchange import Kept, Packed, Peft
from polygraft.grafts.methods.ranges import Count, Dropout, Piece, Projections, Rank
from polygraft.grafts.methods.reparameterised.kronecker import divided
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec

Parts = Mapping[str, TensorDecl]
Values = Mapping[str, "Tensor"]


def vblora(
    r: Rank = 4,
    vectors: Count = 256,
    length: Piece = 256,
    k: int = 2,
    at: Projections = "linear",
    dropout: Dropout = 0.0,
) -> tuple[Slot, ...]:
    """LoRA whose A and B are cut into pieces, each a mixture of the k vectors of one shared bank that it gives the
    largest logits (Li et al. 2024, arXiv 2405.15179, eq. 3.1 to 3.3).

    `vectors` of `length` are in the bank, which all sites share.

    Deviations: Kept with all logits, where the paper stores the k largest of them, so that it can be trained on; the
    widths must be multiples of `length`.

    Choose when: what is stored has to be tiny. While it trains it has `vectors` logits a piece, more than LoRA has
    numbers.
    """
    if not 1 <= k <= vectors:
        raise SpecError(f"peft: vblora.k: {k} of {vectors} vectors; give 1 to {vectors}")
    form = DeclRef("vblora", (("vectors", vectors), ("length", length), ("k", k)))
    return (Branch(at=at, rank=r, dropout=dropout, form=form),)


def unilora(r: Rank = 4, d: Count = 256, at: Projections = "linear", dropout: Dropout = 0.0) -> tuple[Slot, ...]:
    """LoRA whose every element of A and B is one of the d elements of one trained vector, over the root of how often
    that is used: a fixed isometric projection of d numbers into LoRA's space (Li et al. 2025, arXiv 2506.00799).

    Deviations: None known. Which element is which is drawn from the job's seed and kept in the file.

    Choose when: the number of trained parameters is to be set at will, down to a few hundred for a whole model.
    """
    return (Branch(at=at, rank=r, dropout=dropout, form=DeclRef("unilora", (("d", d),))),)


def _vblora_own(slot: Branch, place: SiteShape, vectors: int, length: int, k: int) -> Parts:
    d_in, d_out = divided(place, length)
    small = DeclRef("normal", (("std", 0.1),))
    return {"A": TensorDecl((slot.rank, d_in, vectors), small), "B": TensorDecl((d_out, slot.rank, vectors), small)}


def _vblora_shared(slot: Branch, places: Sequence[SiteShape], vectors: int, length: int, k: int) -> Parts:
    return {"bank": TensorDecl((vectors, length), DeclRef("uniform", (("bound", 0.02),)))}


def _vblora(slot: Branch, values: Values, lowering: Lowering, vectors: int, length: int, k: int) -> Values:
    A, B = (_mixed(values[part], values["bank"], k) for part in "AB")  # [r, in / b, b], [out / b, r, b]
    return {"A": A.flatten(1), "B": B.transpose(0, 1).flatten(1)}


def _mixed(logits: Tensor, bank: Tensor, k: int) -> Tensor:
    """Mixtures of vectors of the bank by the softmax of the k largest logits of each piece."""
    largest, index = logits.topk(k, dim=-1)
    return (largest.softmax(-1).unsqueeze(-1) * bank[index]).sum(-2)


def _unilora_own(slot: Branch, place: SiteShape, d: int) -> Parts:
    """Which element of the vector each of A and B is, as numbers: float32 counts exactly to 2^24."""
    if not 1 <= d < 2**24:
        raise SpecError(f"d: {d} is not a length for Uni-LoRA's vector; give 1 to {2**24 - 1}")
    start = DeclRef("unilora-index", (("d", d),))
    return {
        "index_A": TensorDecl((slot.rank, place.d_in), start, trained=False),
        "index_B": TensorDecl((slot.rank, place.d_out), start, trained=False),
    }


def _unilora_shared(slot: Branch, places: Sequence[SiteShape], d: int) -> Parts:
    scale = DeclRef("unilora-scale", (("d", d),))
    return {
        "theta": TensorDecl((d,), DeclRef("uniform", (("bound", 0.02),))),
        "scale": TensorDecl((d,), scale, trained=False),
    }


def _unilora(slot: Branch, values: Values, lowering: Lowering, d: int) -> Values:
    scaled = values["theta"] * values["scale"]
    return {part: scaled[values[f"index_{part}"].long()] for part in "AB"}


def _uniform(tensor: TensorSpec, making: Making, bound: float) -> Tensor:
    import torch

    return (torch.rand(tensor.shape, generator=making.generator(tensor.name)) * 2 - 1) * bound


def _index(tensor: TensorSpec, making: Making, d: int) -> Tensor:
    return _all_indices(tensor, making, d)[tensor.name]


def _scale(tensor: TensorSpec, making: Making, d: int) -> Tensor:
    """1 / sqrt(how often an element is used), 0 for one that never is."""
    import torch

    used = torch.cat([index.flatten() for index in _all_indices(tensor, making, d).values()]).long()
    counts = used.bincount(minlength=d)
    return torch.where(counts > 0, counts.clamp(min=1).rsqrt(), 0.0)


def _all_indices(tensor: TensorSpec, making: Making, d: int) -> Mapping[str, Tensor]:
    """The indices of all sites of the slot: each element equally often but for the rest, in a random order."""
    import torch

    def make() -> Mapping[str, Tensor]:
        every = making.graft.tensors
        places = [one for one in every if one.slot == tensor.slot and one.part.startswith("index_")]
        total = sum(place.numel for place in places)
        order = torch.randperm(total, generator=making.generator(f"{tensor.slot}.unilora"))
        pieces = (order % d).float().split_with_sizes([place.numel for place in places])
        return {place.name: piece.view(place.shape) for place, piece in zip(places, pieces, strict=True)}

    return making.once(("unilora", tensor.slot), make)


METHODS = (
    Method("vblora", "arXiv 2405.15179", 1e-3, vblora),
    Method("unilora", "arXiv 2506.00799", 5e-3, unilora),
)
PARAMETRIZATIONS = (
    Parametrization("vblora", _vblora, _vblora_own, _vblora_shared),
    Parametrization("unilora", _unilora, _unilora_own, _unilora_shared),
)
STARTS = (Start("uniform", _uniform), Start("unilora-index", _index), Start("unilora-scale", _scale))


def _pack(values: Values, layout: Sequence[TensorSpec], module: Callable[..., str]) -> Values:
    """PEFT gives every element of A and B its own scale."""
    found: dict[str, Tensor] = {}
    for tensor in layout:
        if tensor.part == "theta":
            found["base_model.unilora_theta_d"] = values[tensor.name]
        elif tensor.part.startswith("index_"):
            index = values[tensor.name].long()
            index = index if tensor.part == "index_A" else index.T
            stem = f"{module(tensor.site)}.unilora_"
            found[f"{stem}indices_{tensor.part[-1]}"] = index
            found[f"{stem}scales_{tensor.part[-1]}"] = values[f"{tensor.slot}.shared.scale"][index]
    return found


def _unpack(stored: Values, layout: Sequence[TensorSpec], module: Callable[..., str]) -> Values:
    import torch

    found, scales = {}, []
    for tensor in layout:
        if tensor.part.startswith("index_"):
            stem = f"{module(tensor.site)}.unilora_"
            index, scale = (stored[f"{stem}{kept}_{tensor.part[-1]}"] for kept in ("indices", "scales"))
            scales.append((index.flatten().long(), scale.flatten()))
            found[tensor.name] = (index if tensor.part == "index_A" else index.T).float()
    for tensor in layout:
        if tensor.part == "theta":
            found[tensor.name] = stored["base_model.unilora_theta_d"]
        if tensor.part == "scale":  # the same wherever an element is used
            whole = torch.zeros(tensor.shape)
            for index, scale in scales:
                whole[index] = scale
            found[tensor.name] = whole
    return found


PEFT = (
    Peft(
        kind="VBLORA",
        method="vblora",
        conv1d=True,
        names={
            "r": ("r", 4),
            "vectors": ("num_vectors", 256),
            "length": ("vector_length", 256),
            "k": ("topk", 2),
            "dropout": ("vblora_dropout", 0.0),
        },
        needs={"save_only_topk_weights": False},
        idle={"init_vector_bank_bound": 0.02, "init_logits_std": 0.1},
        own={"A": Kept("vblora_logits_A"), "B": Kept("vblora_logits_B")},
        shared={"bank": Kept("vblora_vector_bank")},
    ),
    Peft(
        kind="UNILORA",
        method="unilora",
        conv1d=True,
        names={"r": ("r", 4), "d": ("theta_d_length", 256), "dropout": ("unilora_dropout", 0.0)},
        needs={"save_indices": True},
        idle={"init_weights": True, "proj_seed": 42, "init_theta_d_bound": 0.02},
        packed=Packed(_pack, _unpack),
    ),
)
