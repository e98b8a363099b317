"""Methods around few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.additive.adapters import act_of
from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.spec import Branch, DeclRef, Delta, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec

Parts = Mapping[str, TensorDecl]
Values = Mapping[str, "Tensor"]
WORD = 24  # signs a number
HALF = 0.6744897501960817  # P(|x| < HALF) = 1/2 for a standard normal x


def peqa(bits: int = 4, group: int = 0, at: str = "linear") -> tuple[Slot, ...]:
    """W becomes s q, with q its rounding to a grid of 2^bits values, frozen, and the scale s of each row, or of each
    group of a row, trained: dW = s q - W (Kim et al. 2023, arXiv 2305.14152, section 3).

    `group` inputs share a scale, all inputs with 0.

    Deviations: W itself is shared and stays as it is, so the memory that an integer W saves is not saved: the graft is
    the scales and dW is made of them.

    Choose when: a model is to be exported in few bits with scales tuned to a task.
    """
    if not 2 <= bits <= 8:
        raise SpecError(f"peft: peqa.bits: {bits} is not 2 to 8")
    return (Delta(at=at, form=DeclRef("peqa", (("bits", bits), ("group", group)))),)


def bitdelta(at: str = "linear") -> tuple[Slot, ...]:
    """dW = a sign(W_tuned - W), one bit an element and a trained factor a for each matrix (Liu et al. 2024, arXiv
    2402.10193, section 3).

    24 signs lie in one number, which float32 holds exactly; `grafts/formats/bitdelta.py` makes the graft from a tuned
    model.

    Deviations: The paper trains a against the tuned model's logits; a job here trains it on its samples.

    Choose when: a fully tuned model of the same backbone is to be served beside grafts at a bit an element.
    """
    return (Delta(at=at, form=DeclRef("bitdelta")),)


def binary_adapter(size: int = 32, scale: float = 1.0, act: str = "gelu", at: str = "ffn.out") -> tuple[Slot, ...]:
    """Bi-Adapter: a parallel adapter whose weights are computed with as mean +- 0.674 deviations, the two medians of a
    normal distribution's halves; rounding passes gradients on (Jie et al. 2023, arXiv 2307.16867, section 3).

    Deviations: B does not start at 0, where its deviation would be 0. The graft is kept with its full weights, so that
    it can be trained on.

    Choose when: an adapter's size counts above all: a bit a weight when it is stored by others.
    """
    return (Branch(at=at, rank=size, scale=scale, act=act_of(act), form=DeclRef("binary")),)


def _peqa_own(slot: Delta, place: SiteShape, bits: int, group: int) -> Parts:
    if group < 0 or (group and place.d_in % group):
        raise SpecError(f"group: {group} does not divide the {place.d_in} inputs of {place.name}")
    groups = place.d_in // group if group else 1
    return {"s": TensorDecl((place.d_out, groups), DeclRef("grid", (("bits", bits),)))}


def _peqa(slot: Delta, values: Values, lowering: Lowering, bits: int, group: int) -> Values:
    s, W = values["s"], lowering.weight()
    grouped = W.to(s.dtype).view(*s.shape, -1)  # [out, groups, group]
    step, least = _grid(grouped, bits)
    zero = (least / step).round()
    q = ((grouped / step).round() - zero).clamp(0, 2**bits - 1) + zero
    return {"W": (s.unsqueeze(2) * q - grouped).view(W.shape)}


def _grid(grouped: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and least value of each group's grid, which spans its values and 0."""
    least, most = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    return ((most - least) / (2**bits - 1)).clamp(min=1e-12), least


def _grid_start(tensor: TensorSpec, making: Making, bits: int) -> Tensor:
    assert tensor.site is not None
    return _grid(making.weight(tensor.site).reshape(*tensor.shape, -1), bits)[0].squeeze(-1)


def _bitdelta_own(slot: Delta, place: SiteShape) -> Parts:
    return {"a": TensorDecl((1,)), "signs": TensorDecl((place.d_out, -(-place.d_in // WORD)), trained=False)}


def _bitdelta(slot: Delta, values: Values, lowering: Lowering) -> Values:
    return {"W": values["a"] * unpacked(values["signs"], lowering.place.d_in).to(values["a"].dtype)}


def packed(change: Tensor) -> Tensor:
    """[out, in / 24] numbers that say which elements of [out, in] are positive."""
    import torch
    from torch.nn import functional as F

    bits = F.pad((change > 0).long(), (0, -change.shape[1] % WORD)).view(len(change), -1, WORD)
    return (bits << torch.arange(WORD)).sum(-1).float()


def unpacked(signs: Tensor, width: int) -> Tensor:
    """[out, width] of +1 and -1."""
    import torch

    bits = signs.long().unsqueeze(-1) >> torch.arange(WORD, device=signs.device) & 1
    return 2 * bits.flatten(1)[:, :width] - 1


def _binary_own(slot: Branch, place: SiteShape) -> Parts:
    """B does not start at 0, where its deviation would be 0 and so would be its gradient's share in it."""
    return {
        "A": TensorDecl((slot.rank, place.d_in), "kaiming"),
        "B": TensorDecl((slot.rank, place.d_out), DeclRef("normal", (("std", 1e-3),))),
    }


def _binary(slot: Branch, values: Values, lowering: Lowering) -> Values:
    return {part: _two_valued(values[part]) for part in "AB"}


def _two_valued(w: Tensor) -> Tensor:
    mean, deviation = w.mean(), w.std()
    z = (w - mean) / (deviation + 1e-5)
    rounded = HALF * z.detach().sign() + (z - z.detach())
    return rounded * deviation + mean


METHODS = (
    Method("peqa", "arXiv 2305.14152", 1e-4, peqa),
    Method("bitdelta", "arXiv 2402.10193", 1e-4, bitdelta),
    Method("binary-adapter", "arXiv 2307.16867", 1e-3, binary_adapter, aliases=("bi-adapter",)),
)
PARAMETRIZATIONS = (
    Parametrization("peqa", _peqa, _peqa_own),
    Parametrization("bitdelta", _bitdelta, _bitdelta_own),
    Parametrization("binary", _binary, _binary_own),
)
STARTS = (Start("grid", _grid_start),)
