"""Prefix tuning: trained keys and values before every layer's own (Li & Liang 2021, arXiv 2101.00190; without the MLP
p-tuning v2, Liu et al. 2022, arXiv 2110.07602). With it, all rows are made by one network of two layers from one small
embedding, [k_l; v_l] = W2_l tanh(W1 E + b1) + b2_l (Li & Liang 2021, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Form, Lowering, Method, Part, Place
from polygraft.grafts.spec import KV, Call, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor


def prefix(length: int = 10) -> tuple[Slot, ...]:
    return (KV(length=length),)


def prefix_mlp(length: int = 10, hidden: int = 512) -> tuple[Slot, ...]:
    if hidden < 1:
        raise SpecError(f"peft: hidden: {hidden} is not a size; give at least 1")
    return (KV(length=length, form=Call("prefix-mlp", (("hidden", hidden),))),)


def _shared(slot: KV, places: Sequence[Place], hidden: int) -> Mapping[str, Part]:
    width = places[0].d_out
    return {
        "E": Part((slot.length, width), Call("normal", (("std", 1.0),))),
        "W1": Part((hidden, width), "kaiming"),
        "b1": Part((hidden,)),
        "W2": Part((2 * len(places) * width, hidden), "kaiming"),
        "b2": Part((2 * len(places) * width,)),
    }


def _operands(slot: KV, values: Mapping[str, Tensor], lowering: Lowering, hidden: int) -> Mapping[str, Tensor]:
    import torch

    width = lowering.place.d_out
    own = slice(2 * lowering.place.index * width, 2 * (lowering.place.index + 1) * width)
    rows = torch.tanh(values["E"] @ values["W1"].T + values["b1"]) @ values["W2"][own].T + values["b2"][own]
    return {"k": rows[:, :width], "v": rows[:, width:]}


METHODS = (
    Method("prefix", "arXiv 2101.00190", 5e-3, prefix, aliases=("p-tuning-v2",)),
    Method("prefix-mlp", "arXiv 2101.00190", 1e-3, prefix_mlp),
)
FORMS = (Form("prefix-mlp", _operands, shared=_shared),)
