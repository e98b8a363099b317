"""Norms and what stands beside every operation: LN-tuning trains the norms' scales alone (Zhao et al. 2024, arXiv
2312.11420, section 3), as factors g on the frozen ones, w' = w g. SSF scales and shifts the output of every operation,
y = g y + b (Lian et al. 2022, arXiv 2210.08823, eq. 5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.exchange import Packed, Peft
from polygraft.grafts.spec import Affine, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.formats.stock import Stock
    from polygraft.grafts.sizes import TensorSpec

Values = Mapping[str, "Tensor"]


def ln_tuning(at: str = "norm.*") -> tuple[Slot, ...]:
    return (Affine(at=at, scale=True, shift=False),)


def ssf(at: str = "linear|norm.*") -> tuple[Slot, ...]:
    return (Affine(at=at, scale=True, shift=True),)


METHODS = (
    Method("ln-tuning", "arXiv 2312.11420", 1e-3, ln_tuning),
    Method("ssf", "arXiv 2210.08823", 1e-3, ssf),
)


def _pack(values: Values, layout: Sequence[TensorSpec], module: Callable[..., str], stock: Stock) -> Values:
    """PEFT keeps the whole w'; where an architecture's factor is c + w, c + w' = g (c + w)."""
    found: dict[str, Tensor] = {}
    for tensor in layout:
        assert tensor.site is not None
        weight, offset = stock.norm(tensor.site)
        found[f"{module(tensor.site)}.ln_tuning_layers.weight"] = values[tensor.name] * (offset + weight) - offset
    return found


def _unpack(stored: Values, layout: Sequence[TensorSpec], module: Callable[..., str], stock: Stock) -> Values:
    found: dict[str, Tensor] = {}
    for tensor in layout:
        assert tensor.site is not None
        weight, offset = stock.norm(tensor.site)
        found[tensor.name] = (offset + stored[f"{module(tensor.site)}.ln_tuning_layers.weight"]) / (offset + weight)
    return found


PEFT = (Peft(kind="LN_TUNING", method="ln-tuning", layered=False, packed=Packed(_pack, _unpack, stock=True)),)
