"""RoAd: pairs of outputs turned and scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Lowering, Method, Parametrization, SiteShape, TensorDecl
from polygraft.grafts.methods.exchange import Kept, Peft
from polygraft.grafts.methods.ranges import Projections
from polygraft.grafts.spec import DeclRef, Rotate, Slot, SpecError

if TYPE_CHECKING:
    from torch import Tensor

_VARIANTS = {1: 0.5, 2: 1, 4: 2}  # angles an output


def road(variant: int = 1, group: int = 64, at: Projections = "linear") -> tuple[Slot, ...]:
    """Pairs of a projection's outputs are turned and scaled, y1' = a cos(t) y1 - a sin(t) y2, y2' = a sin(t) y1 + a
    cos(t) y2 (Liao & Monz 2024, arXiv 2409.00119, eq. 4).

    One angle and scale a pair (`variant` 1), an output (2), or an entry of the 2 x 2 matrices (4); an output's partner
    is half a `group` away.

    Deviations: Partners are as in PEFT; the paper pairs neighbours.

    Choose when: many small grafts are to be served at once: two vectors a site, all elementwise.
    """
    if variant not in _VARIANTS:
        raise SpecError(f"variant: {variant} is not one of {', '.join(map(str, _VARIANTS))}")
    return (Rotate(at=at, kind="pairs", size=group, form=DeclRef("road", (("variant", variant),))),)


def _own(slot: Rotate, place: SiteShape, variant: int) -> Mapping[str, TensorDecl]:
    slot.check(place.d_out)
    count = (int(place.d_out * _VARIANTS[variant]),)
    return {"theta": TensorDecl(count), "alpha": TensorDecl(count, "one")}


def _operands(slot: Rotate, values: Mapping[str, Tensor], lowering: Lowering, variant: int) -> Mapping[str, Tensor]:
    theta, alpha = (_columns(values[part], slot.size, variant) for part in ("theta", "alpha"))
    return {"c": alpha[0] * theta[0].cos(), "s": alpha[1] * theta[1].sin()}


def _columns(vector: Tensor, group: int, variant: int) -> tuple[Tensor, Tensor]:
    """What every output takes for the cosine and for the sine."""
    if variant == 4:
        cosines, sines = vector.view(-1, 2, group).unbind(1)
        return cosines.reshape(-1), sines.reshape(-1)
    if variant == 1:
        vector = vector.view(-1, group // 2).repeat_interleave(2, dim=0).reshape(-1)
    return vector, vector


METHODS = (Method("road", "arXiv 2409.00119", 1e-3, road),)
PARAMETRIZATIONS = (Parametrization("road", _operands, _own),)
PEFT = (
    Peft(
        kind="ROAD",
        method="road",
        biases=False,
        names={"group": ("group_size", 64)},
        fields=lambda variant, **_: {"variant": f"road_{variant}"},
        arguments=lambda config: {"variant": str(config.get("variant", "road_1")).removeprefix("road_")},
        reads=("variant",),
        idle={"init_weights": True},
        layered=False,
        own={"theta": Kept("road_theta"), "alpha": Kept("road_alpha")},
    ),
)
