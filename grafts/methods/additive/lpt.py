"""Late prompt tuning: a prompt that enters at a layer.

In a decoder the rows of P see none but themselves. So what they leave in the layers from there on, keys and values, is
a function of P and the frozen weights alone: a form of a prefix, which the graft is when it is served. Rotary positions
are 0 to p - 1, the input's begin at p, as after any prefix; learned ones are added below and so are not P's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.methods.ranges import Rows
from polygraft.grafts.spec import KV, DeclRef, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec


def lpt(length: Rows = 20) -> tuple[Slot, ...]:
    """Late prompt tuning: a trained prompt P enters in front of the rows before the first of its layers and runs on
    with them through the frozen ones, [P; H] (Liu et al. 2022, arXiv 2210.11292, section 3). P starts as what that
    layer reads of a sample.

    The paper takes the upper half of the layers: `lpt(20)@16-31` of 32.

    Deviations: Without the paper's prompt generator, which makes P of the input: it is "LPT w/o PG" there. Other
    methods in the same graft do not act on P's rows.

    Choose when: prompt tuning converges too slowly: the gradient goes back half as far. Served it is a prefix of its
    layers.
    """
    return (KV(length=length, form=DeclRef("lpt")),)


def _shared(slot: KV, places: Sequence[SiteShape]) -> Mapping[str, TensorDecl]:
    return {"P": TensorDecl((slot.length, places[0].d_in), "states")}


def _operands(slot: KV, values: Mapping[str, Tensor], lowering: Lowering) -> Mapping[str, Tensor]:
    k, v = lowering.run_from_layer(values["P"], _first(slot))[lowering.place.layer]
    return {"k": k, "v": v}


def _states(tensor: TensorSpec, making: Making) -> Tensor:
    slot = making.spec.slots[tensor.slot]
    assert isinstance(slot, KV)
    return making.states(tensor.shape[0], _first(slot))


def _first(slot: KV) -> int:
    return min(slot.layers or (0,))


METHODS = (Method("lpt", "arXiv 2210.11292", 5e-3, lpt, aliases=("late-prompt",)),)
PARAMETRIZATIONS = (Parametrization("lpt", _operands, shared=_shared, runs_layers=True),)
STARTS = (Start("states", _states),)
