"""Adapters and LoRAs of which a binary mask keeps a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from polygraft.grafts.methods.additive.adapters import act_of
from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.ranges import Alpha, Density, Dropout, Projections, Rank, Sublayers, Width
from polygraft.grafts.spec import Branch, DeclRef, GraftSpec, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec

Parts = Mapping[str, TensorDecl]
Values = Mapping[str, "Tensor"]
SMALL = DeclRef("normal", (("std", 0.01),))
_CRITERIA = {"magnitude": "largest", "snip": "snip", "random": "bernoulli"}


def sparse_adapter(
    size: Width = 256,
    density: Density = 0.2,
    by: str = "magnitude",
    act: str = "gelu",
    at: Sublayers = "attn.out|ffn.out",
) -> tuple[Slot, ...]:
    """A serial adapter that is pruned before it is trained, so that a wide one costs as much as a narrow dense one (He
    et al. 2022, arXiv 2210.04284).

    `by` is what stays: the largest starting values (magnitude), those without which the loss on the first samples would
    change most (snip), or random ones.

    Deviations: Of the paper's criteria SNIP, magnitude and random are here, Erdos-Renyi and GraSP are not. The mask
    multiplies: no time or memory is saved, only numbers.

    Choose when: you want a large bottleneck ("large-sparse") at a small number of parameters that learn.
    """
    if by not in _CRITERIA:
        raise SpecError(f"peft: sparse-adapter.by: {by!r} is not a criterion; choices: {', '.join(_CRITERIA)}")
    form = DeclRef("sparse-adapter", (("density", _density(density)), ("by", by)))
    return (Branch(at=at, rank=size, act=act_of(act), tap="output", form=form),)


def propetl(
    size: Width = 64, density: Density = 0.5, act: str = "gelu", at: Sublayers = "attn.out|ffn.out"
) -> tuple[Slot, ...]:
    """One adapter for all sites, of which every site keeps the elements with its own largest scores: a prototype under
    binary masks, a score having the gradient of its mask (Zeng et al. 2023, arXiv 2305.17682).

    Deviations: Layers share the prototype, tasks do not: a job has one. The paper's forms over LoRA and prefixes are
    left out. While it trains the scores are numbers of full size; a mask is a bit only when it is saved by others.

    Choose when: many sites should share one adapter. What has to be kept for good is the prototype and a bit an
    element.
    """
    form = DeclRef("propetl", (("density", _density(density)),))
    return (Branch(at=at, rank=size, act=act_of(act), tap="output", form=form),)


def capaboost(
    r: Rank = 8,
    alpha: Alpha = 16.0,
    d: int = 2,
    density: Density = 0.5,
    at: Projections = "linear",
    dropout: Dropout = 0.0,
) -> tuple[Slot, ...]:
    """d LoRAs that share A and B under d fixed random masks, whose sum has up to d times the rank: dW = s sum_i (B *
    M_i) (A * M'_i) (Song et al. 2024, arXiv 2407.01320).

    Deviations: Only over LoRA; the paper also has it over adapters and prefixes. The masks multiply, so that it
    computes with d times the ranks.

    Choose when: LoRA's rank is the limit and its number of parameters must not grow.
    """
    form = DeclRef("capaboost", (("d", max(d, 1)), ("density", _density(density))))
    return (Branch(at=at, rank=r * max(d, 1), scale=alpha / max(r, 1), dropout=dropout, form=form),)


def _density(density: float) -> float:
    if not 0.0 < density <= 1.0:
        raise SpecError(f"peft: density: {density} is outside (0, 1]")
    return density


def _sparse_own(slot: Branch, place: SiteShape, density: float, by: str) -> Parts:
    kept = DeclRef(_CRITERIA[by], (("p" if by == "random" else "density", density),))
    shapes = {"A": (slot.rank, place.d_in), "B": (slot.rank, place.d_out)}
    return {part: TensorDecl(shape, SMALL) for part, shape in shapes.items()} | {
        f"mask_{part}": TensorDecl(shape, kept, trained=False) for part, shape in shapes.items()
    }


def _sparse(slot: Branch, values: Values, lowering: Lowering, density: float, by: str) -> Values:
    return {part: values[part] * values[f"mask_{part}"] for part in "AB"}


def _propetl_own(slot: Branch, place: SiteShape, density: float) -> Parts:
    return {
        "score_A": TensorDecl((slot.rank, place.d_in), "kaiming"),
        "score_B": TensorDecl((slot.rank, place.d_out), "kaiming"),
    }


def _propetl_shared(slot: Branch, places: Sequence[SiteShape], density: float) -> Parts:
    """As wide as the widest site, of which a narrower one takes the first columns."""
    widest = max(place.d_in for place in places), max(place.d_out for place in places)
    return {"A": TensorDecl((slot.rank, widest[0]), SMALL), "B": TensorDecl((slot.rank, widest[1]), SMALL)}


def _propetl(slot: Branch, values: Values, lowering: Lowering, density: float) -> Values:
    found = {}
    for part in "AB":
        score = values[f"score_{part}"]
        kept = max(1, round(density * score.numel()))
        least = score.detach().flatten().topk(kept).values[-1]
        mask = (score.detach() >= least).to(score.dtype) + (score - score.detach())
        found[part] = values[part][:, : score.shape[1]] * mask
    return found


def _capaboost_own(slot: Branch, place: SiteShape, d: int, density: float) -> Parts:
    r, kept = slot.rank // d, DeclRef("bernoulli", (("p", density),))
    return {
        "A": TensorDecl((r, place.d_in), "kaiming"),
        "B": TensorDecl((r, place.d_out)),
        "mask_A": TensorDecl((d, r, place.d_in), kept, trained=False),
        "mask_B": TensorDecl((d, r, place.d_out), kept, trained=False),
    }


def _capaboost(slot: Branch, values: Values, lowering: Lowering, d: int, density: float) -> Values:
    return {part: (values[part] * values[f"mask_{part}"]).flatten(0, 1) for part in "AB"}


def _bernoulli(tensor: TensorSpec, making: Making, p: float) -> Tensor:
    import torch

    return (torch.rand(tensor.shape, generator=making.generator(tensor.name)) < p).float()


def _largest(tensor: TensorSpec, making: Making, density: float) -> Tensor:
    """1 where the starting value of A or B is among the largest of all that the slot has."""

    def make() -> Mapping[str, Tensor]:
        return _best({name: value.abs() for name, value in _started(tensor.slot, making).items()}, density)

    return making.once(("largest", tensor.slot), make)[tensor.name.replace("mask_", "")]


def _snip(tensor: TensorSpec, making: Making, density: float) -> Tensor:
    """1 where |w dL/dw| is among the largest, for the starting value w (Lee et al. 2019, eq. 5)."""

    def make() -> Mapping[str, Tensor]:
        slot, values = making.spec.slots[tensor.slot], _started(tensor.slot, making)
        plain = GraftSpec("started", (replace(slot, form=None),))
        first = {f"0.{name.partition('.')[2]}": value for name, value in values.items()}
        slopes = making.graft_gradients(plain, first)
        pairs = zip(values.items(), first, strict=True)
        return _best({name: (value * slopes[own]).abs() for (name, value), own in pairs}, density)

    return making.once(("snip", tensor.slot), make)[tensor.name.replace("mask_", "")]


def _started(slot: int, making: Making) -> Mapping[str, Tensor]:
    """The values that A and B of a slot start with, by name."""
    import torch

    std = float(SMALL.keywords()["std"])
    return {
        one.name: std * torch.randn(one.shape, generator=making.generator(one.name))
        for one in making.graft.tensors
        if one.slot == slot and one.part in ("A", "B")
    }


def _best(scores: Mapping[str, Tensor], density: float) -> Mapping[str, Tensor]:
    """Masks of the share `density` of all scores together."""
    import torch

    total = torch.cat([score.flatten() for score in scores.values()])
    least = total.topk(max(1, round(density * len(total)))).values[-1]
    return {name: (score >= least).float() for name, score in scores.items()}


METHODS = (
    Method("sparse-adapter", "arXiv 2210.04284", 1e-3, sparse_adapter),
    Method("propetl", "arXiv 2305.17682", 1e-3, propetl),
    Method("capaboost", "arXiv 2407.01320", 3e-4, capaboost),
)
PARAMETRIZATIONS = (
    Parametrization("sparse-adapter", _sparse, _sparse_own),
    Parametrization("propetl", _propetl, _propetl_own, _propetl_shared),
    Parametrization("capaboost", _capaboost, _capaboost_own),
)
STARTS = (Start("bernoulli", _bernoulli), Start("largest", _largest), Start("snip", _snip))
