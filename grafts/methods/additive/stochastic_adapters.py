"""Serial adapters of which each step trains another random part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from zlib import crc32

from polygraft.grafts.methods.additive.adapters import act_of
from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.ranges import Experts, Sublayers, Width
from polygraft.grafts.spec import Branch, DeclRef, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

Values = Mapping[str, "Tensor"]


def adapter_drop(
    size: Width = 64, upto: int = 11, drop: int = 0, act: str = "gelu", at: Sublayers = "attn.out|ffn.out"
) -> tuple[Slot, ...]:
    """AdapterDrop: every step draws n from 0 to `upto` and goes without the serial adapters of the first n layers, so
    that the graft may be served without those of any so many (Rueckle et al. 2021, arXiv 2010.11918, section 3).

    `drop` is how many first layers go without when the graft is served and evaluated. What is dropped is not computed:
    its rows pass no adapter, in a step or in a served forward, and a backward ends above the layers where no job of the
    pack has one.

    Deviations: n is drawn for a job's global batch and not for each of its micro-batches. Pruning whole adapters by
    AdapterFusion's weights (the paper's section 5.2) is not here.

    Choose when: a serial adapter is to be served faster, with a little less quality, by leaving out its first layers.
    Where all layers stay in, serial learns more.
    """
    if upto < 1 or not 0 <= drop <= upto:
        raise SpecError(f"peft: adapter-drop: upto {upto} and drop {drop}; give 0 <= drop <= upto, and upto >= 1")
    form = DeclRef("adapter-drop", (("upto", upto), ("served", drop)))
    return (Branch(at=at, rank=size, act=act_of(act), tap="output", form=form),)


def averaged_adapters(
    size: Width = 16, experts: Experts = 4, act: str = "relu", at: str = "ffn.out"
) -> tuple[Slot, ...]:
    """Serial adapters with several matrices down and several up, of which every training step and site uses a random
    one each, drawn apart; served are their means (after AdaMix: Wang et al. 2022, arXiv 2205.12410, section 3).

    Deviations: AdaMix runs each sample twice and adds a KL divergence between both predictions, which draws the experts
    together so that their mean is good; here is one pass and no such loss, and hence the name.

    Choose when: an adapter overfits: it trains as a small ensemble and serves as one.
    """
    if experts < 1:
        raise SpecError(f"peft: experts: {experts} is not a count; give at least 1")
    form = DeclRef("averaged-adapters", (("experts", experts),))
    return (Branch(at=at, rank=size, act=act_of(act), tap="output", form=form),)


def _own(slot: Branch, place: SiteShape, **_: object) -> Mapping[str, TensorDecl]:
    return {"A": TensorDecl((slot.rank, place.d_in), "kaiming"), "B": TensorDecl((slot.rank, place.d_out))}


def _all(slot: Branch, values: Values, lowering: Lowering, upto: int, served: int) -> Values:
    return {"A": values["A"], "B": values["B"]}


def _dropped(layer: int, draw: int | None, upto: int, served: int) -> bool:
    return layer < (served if draw is None else draw % (upto + 1))


def _some_left(slot: Branch, places: tuple[SiteShape, ...], upto: int, served: int) -> Mapping[str, TensorDecl]:
    if served > (last := max(place.layer for place in places)):
        raise SpecError(f"drop: {served} leaves no adapter in the layers up to {last}; give at most {last}")
    return {}


def _own_each(slot: Branch, place: SiteShape, experts: int) -> Mapping[str, TensorDecl]:
    return {
        "A": TensorDecl((experts * slot.rank, place.d_in), "kaiming"),
        "B": TensorDecl((experts * slot.rank, place.d_out)),
    }


def _one_or_mean(slot: Branch, values: Values, lowering: Lowering, experts: int) -> Values:
    each = {part: value.view(experts, slot.rank, -1) for part, value in values.items()}
    if lowering.draw is None:
        return {part: value.mean(0) for part, value in each.items()}
    place = lowering.place
    return {
        part: value[crc32(f"{lowering.draw}/{place.layer}.{place.name}.{part}".encode()) % experts]
        for part, value in each.items()
    }


METHODS = (
    Method("adapter-drop", "arXiv 2010.11918", 1e-3, adapter_drop, aliases=("adapterdrop",)),
    Method("averaged-adapters", "arXiv 2205.12410", 1e-3, averaged_adapters),
)
PARAMETRIZATIONS = (
    Parametrization("adapter-drop", _all, _own, _some_left, kept=("A", "B"), absent=_dropped),
    Parametrization("averaged-adapters", _one_or_mean, _own_each, formerly="adamix"),
)
