"""Late prompt tuning: a trained prompt P enters before a middle layer, in front of the rows H there, and runs on with
them through the frozen layers above, [P; H] (Liu et al. 2022, arXiv 2210.11292, section 3; without the paper's
generator, which makes P of the input: "LPT w/o PG").

In a decoder the rows of P see none but themselves. So what they leave in the layers from there on, keys and values, is
a function of P and the frozen weights alone: a form of a prefix, which the graft is when it is served. Other methods in
the same graft do not act on these rows. Rotary positions are 0 to p - 1, the input's begin at p, as after any prefix;
learned ones are added below and so are not P's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, Start, TensorDecl
from polygraft.grafts.spec import KV, DeclRef, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec


def lpt(length: int = 20) -> tuple[Slot, ...]:
    """A prompt P enters before the first of its layers and runs on through the frozen ones, [P; H] (Liu et al. 2022,
    section 3, without its generator). The paper takes the upper half, `lpt(20)@16-31`; P starts as what that layer
    reads of a sample."""
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
