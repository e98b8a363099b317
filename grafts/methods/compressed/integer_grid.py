"""Grafts that put W on a grid of small integers and can be folded into it: merged, W' = scale q + offset with whole
numbers q of `bits` bits, and nothing is rounded.

The backbone's W is shared and stays as it is, so a graft of these computes with x (W' - W)^T beside W x, and W' is made
from W whenever it is needed. What the papers save of W's memory in training is therefore not saved here; what they
promise for the merged model is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import (
    IntegerGrid,
    Lowering,
    Method,
    Parametrization,
    SiteShape,
    Start,
    TensorDecl,
)
from polygraft.grafts.methods.ranges import Alpha, Projections, Rank
from polygraft.grafts.spec import DeclRef, Delta, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec

Parts = Mapping[str, TensorDecl]
Values = Mapping[str, "Tensor"]
_SMALLEST = 1e-12  # step of a grid, where all values are the same


def peqa(bits: int = 4, group: int = 0, at: Projections = "linear") -> tuple[Slot, ...]:
    """PEQA: W' = s (clamp(round(W / s0) + z0, 0, 2^bits - 1) - z0), the integers and zero points frozen and the scale s
    of each row, or of each `group` inputs of a row, trained from s0 (Kim et al. 2023, arXiv 2305.14152, eq. 1-2).

    Deviations: s0 and z0 are those of the grid that spans a group's values and 0, where the paper fits them to W; W
    lies in its own precision beside the integers until the graft is merged, so that training takes no less memory.

    Choose when: the merged model is to be served in few bits, and several tasks are to share its integers. Every step
    makes dense matrices; for the smallest graft take ia3.
    """
    return (Delta(at=at, form=DeclRef("peqa", (("bits", _checked("peqa", bits)), ("group", group)))),)


def qalora(
    r: Rank = 8, alpha: Alpha = 16.0, group: int = 32, bits: int = 4, at: Projections = "linear"
) -> tuple[Slot, ...]:
    """QA-LoRA: y = x W~ + s (L pool(x)) A B with W~ = a round((W - b) / a) + b quantised by groups of L = `group`
    inputs, a = (max - min) / (2^bits - 1) and b = min, and pool the mean of each group; since all inputs of a group
    share the change, it merges into the offsets, b' = b + s A B (Xu et al. 2023, arXiv 2309.14717, eq. 1 and algorithm
    1).

    Deviations: W~ is rounded to nearest, where the paper's experiments take GPTQ's; W lies in its own precision beside
    it until the graft is merged, so that training takes no less memory.

    Choose when: the merged model is to be served in few bits without being quantised anew. Every step makes dense
    matrices; beside a backbone in 4 bits that stays as it is, take lora or loftq.
    """
    if r < 1:
        raise SpecError(f"peft: qalora.r: {r} is not a size; give at least 1")
    grid = (("group", group), ("bits", _checked("qalora", bits)))
    return (Delta(at=at, form=DeclRef("qa-lora", (("r", r), ("scale", alpha / r), *grid))),)


def _checked(method: str, bits: int) -> int:
    if not 2 <= bits <= 8:
        raise SpecError(f"peft: {method}.bits: {bits} is not 2 to 8")
    return bits


def _groups(place: SiteShape, group: int) -> int:
    if group < 0 or (group and place.d_in % group):
        raise SpecError(f"group: {group} does not divide the {place.d_in} inputs of {place.name}")
    return place.d_in // group if group else 1


def _grouped(W: Tensor, groups: int) -> Tensor:
    """[out, groups, inputs of a group]."""
    return W.view(len(W), groups, -1)


def _peqa_own(slot: Delta, place: SiteShape, bits: int, group: int) -> Parts:
    return {"s": TensorDecl((place.d_out, _groups(place, group)), DeclRef("grid", (("bits", bits),)))}


def _peqa_grid(slot: Delta, values: Values, lowering: Lowering, bits: int, group: int) -> IntegerGrid:
    s = values["s"]
    grouped = _grouped(lowering.weight().to(s.dtype), s.shape[1])
    step, least = _around_zero(grouped, bits)
    zero = (least / step).round()
    q = ((grouped / step).round() - zero).clamp(0, 2**bits - 1) + zero
    return IntegerGrid(q, s, s.new_zeros(s.shape), bits)


def _around_zero(grouped: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and least value of each group's grid, which spans its values and 0."""
    least, most = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    return ((most - least) / (2**bits - 1)).clamp(min=_SMALLEST), least


def _first_scale(tensor: TensorSpec, making: Making, bits: int) -> Tensor:
    assert tensor.site is not None
    return _around_zero(_grouped(making.weight(tensor.site), tensor.shape[1]), bits)[0].squeeze(-1)


def _qalora_own(slot: Delta, place: SiteShape, r: int, scale: float, group: int, bits: int) -> Parts:
    if group < 1:
        raise SpecError(f"group: {group} is not a size; give at least 1")
    return {"A": TensorDecl((r, _groups(place, group)), "kaiming"), "B": TensorDecl((r, place.d_out))}


def _qalora_grid(  # noqa: PLR0913
    slot: Delta, values: Values, lowering: Lowering, r: int, scale: float, group: int, bits: int
) -> IntegerGrid:
    A, B = values["A"], values["B"]
    grouped = _grouped(lowering.weight().to(A.dtype), A.shape[1])
    least, most = grouped.amin(-1), grouped.amax(-1)
    step = ((most - least) / (2**bits - 1)).clamp(min=_SMALLEST)
    q = ((grouped - least.unsqueeze(-1)) / step.unsqueeze(-1)).round().clamp(0, 2**bits - 1)
    return IntegerGrid(q, step, least + scale * (B.T @ A), bits)


def _peqa(slot: Delta, values: Values, lowering: Lowering, **arguments: int) -> Values:
    return _change(_peqa_grid(slot, values, lowering, **arguments), lowering)


def _qalora(slot: Delta, values: Values, lowering: Lowering, r: int, scale: float, group: int, bits: int) -> Values:  # noqa: PLR0913
    return _change(_qalora_grid(slot, values, lowering, r, scale, group, bits), lowering)


def _change(grid: IntegerGrid, lowering: Lowering) -> Values:
    """W' - W."""
    W = grid.weight()
    return {"W": W - lowering.weight().to(W.dtype)}


METHODS = (
    Method("peqa", "arXiv 2305.14152", 1e-4, peqa),
    Method("qalora", "arXiv 2309.14717", 3e-4, qalora),
)
PARAMETRIZATIONS = (
    Parametrization("peqa", _peqa, _peqa_own, grid=_peqa_grid),
    Parametrization("qa-lora", _qalora, _qalora_own, grid=_qalora_grid),
)
STARTS = (Start("grid", _first_scale),)
