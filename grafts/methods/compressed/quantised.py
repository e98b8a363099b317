"""Methods around few bits.

- BitDelta (Liu et al. 2024, arXiv 2402.10193, section 3): dW = a sign(W_tuned - W), one bit an element and a trained a
  (`grafts/formats/bitdelta.py` makes it from a tuned model). 24 signs lie in one number, which float32 holds exactly.
- Bi-Adapter (Jie et al. 2023, arXiv 2307.16867, section 3): a parallel adapter whose weights are computed with as mean
  +- 0.674 deviations, the two medians of a normal distribution's halves; rounding passes gradients on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.additive.adapters import act_of
from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.spec import Branch, DeclRef, Delta, Slot

if TYPE_CHECKING:
    from torch import Tensor


Parts = Mapping[str, TensorDecl]
Values = Mapping[str, "Tensor"]
WORD = 24  # signs a number
HALF = 0.6744897501960817  # P(|x| < HALF) = 1/2 for a standard normal x


def bitdelta(at: str = "linear") -> tuple[Slot, ...]:
    return (Delta(at=at, form=DeclRef("bitdelta")),)


def binary_adapter(size: int = 32, scale: float = 1.0, act: str = "gelu", at: str = "ffn.out") -> tuple[Slot, ...]:
    return (Branch(at=at, rank=size, scale=scale, act=act_of(act), form=DeclRef("binary")),)


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
    Method("bitdelta", "arXiv 2402.10193", 1e-4, bitdelta),
    Method("binary-adapter", "arXiv 2307.16867", 1e-3, binary_adapter, aliases=("bi-adapter",)),
)
PARAMETRIZATIONS = (
    Parametrization("bitdelta", _bitdelta, _bitdelta_own),
    Parametrization("binary", _binary, _binary_own),
)
