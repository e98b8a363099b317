"""Norms, and what stands beside every operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.exchange import Packed, Peft
from polygraft.grafts.spec import Affine, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.formats.backbone_files import BackboneFiles
    from polygraft.grafts.sizes import TensorSpec

Values = Mapping[str, "Tensor"]


def ln_tuning(at: str = "norm.*") -> tuple[Slot, ...]:
    """The scales of the norms are trained alone, as factors g on the frozen ones, w' = w g (Zhao et al. 2024, arXiv
    2312.11420, section 3).

    Deviations: A factor on w is trained in place of w, so that the same learning rate means another step; norms' biases
    are not trained (`ssf(at=norm.*)` trains both). The paper trains connector, embeddings and head as well.

    Choose when: the smallest change of all is to be tried, or beside another method, as in adapters' papers. It needs a
    high rate.
    """
    return (Affine(at=at, scale=True, shift=False),)


def ssf(at: str = "linear|norm.*") -> tuple[Slot, ...]:
    """Every operation's output is scaled and shifted, y = g y + b (Lian et al. 2022, arXiv 2210.08823, eq. 4).

    Deviations: At projections and norms; the paper's vision model has it after its patch embedding, too.

    Choose when: a vision recipe is followed, or `ia3` is too little. At inner sites it merges; the last norm's does
    not.
    """
    return (Affine(at=at, scale=True, shift=True),)


METHODS = (
    Method("ln-tuning", "arXiv 2312.11420", 1e-3, ln_tuning),
    Method("ssf", "arXiv 2210.08823", 1e-3, ssf),
)


def _pack(
    values: Values, layout: Sequence[TensorSpec], module: Callable[..., str], backbone_files: BackboneFiles, _: object
) -> Values:
    """PEFT keeps the whole norm: w' with c + w' = g (c + w) where an architecture's factor is c + w, and g b."""
    found: dict[str, Tensor] = {}
    for tensor in layout:
        assert tensor.site is not None
        weight, bias, offset = (
            backbone_files.weight(tensor.site),
            backbone_files.bias(tensor.site),
            backbone_files.norm_offset,
        )
        key, g = f"{module(tensor.site)}.ln_tuning_layers", values[tensor.name]
        found[f"{key}.weight"] = g * (offset + weight) - offset
        if bias is not None:
            found[f"{key}.bias"] = g * bias
    return found


def _unpack(
    stored: Values, layout: Sequence[TensorSpec], module: Callable[..., str], backbone_files: BackboneFiles, _: object
) -> Values:
    found: dict[str, Tensor] = {}
    for tensor in layout:
        assert tensor.site is not None
        weight, offset = backbone_files.weight(tensor.site), backbone_files.norm_offset
        found[tensor.name] = (offset + stored[f"{module(tensor.site)}.ln_tuning_layers.weight"]) / (offset + weight)
    return found


def _shift(
    stored: Values, module: str, slot: Slot, number: Callable[[str], Tensor | None]
) -> tuple[Tensor, set[str]] | None:
    """What the norm's bias is beyond its scaled one; 0 where that is rounding."""
    own, factor = number("bias"), number("weight")
    if own is None or factor is None:
        return None
    weight, bias = (stored[f"{module}.ln_tuning_layers.{end}"].double() for end in ("weight", "bias"))
    scaled = weight / factor * own
    return (bias - scaled).where(~bias.isclose(scaled, rtol=1e-4, atol=1e-6), 0.0), set()


PEFT = (
    Peft(
        kind="LN_TUNING",
        method="ln-tuning",
        conv1d=True,
        layered=False,
        biases=False,
        packed=Packed(_pack, _unpack, reads_backbone=True),
        shift=_shift,
        trains_biases=True,
    ),
)
