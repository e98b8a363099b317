"""What the machine allows: the backbone's own products and nothing else, as fast as either layout of the weights does
them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from child import Round
from material import Material
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.linears.protocol import FrozenLinear


class Ceiling:
    """`passes` through every frozen linear with `rows` rows and the head, and back to the input with `backward`.

    A round is all of its passes, as an arm's is all of its steps: with plain weights or with prepacked ones, in turn,
    whichever take less time for all of them.
    """

    def __init__(self, material: Material, *, rows: int, passes: int, backward: bool) -> None:
        self._material, self._rows, self._passes, self._backward = material, rows, passes, backward

    def load(self) -> str:
        backbone = Backbone.load(Path(self._material.backbone))
        self._linears = [*{id(linear): linear for linear, _ in backbone.linears.values()}.values(), backbone.head]
        self._plain = [linear.weight().clone() for linear in self._linears]
        sizes = {size for linear in self._linears for size in (linear.in_features, linear.out_features)}
        self._x = {size: torch.randn(self._rows, size).to(backbone.dtype) for size in sizes}
        return str(backbone.dtype).removeprefix("torch.")

    def warm(self) -> None:
        self._faster(1)

    def round(self) -> Round:
        return Round(self._passes * self._rows, 0.0, self._faster(self._passes))

    @torch.inference_mode()
    def _faster(self, passes: int) -> float:
        """Seconds of so many passes in the faster layout."""
        pairs = [(_seconds(self._plain_pass), _seconds(self._packed_pass)) for _ in range(passes)]
        return min(map(sum, zip(*pairs, strict=True)))

    def _plain_pass(self) -> None:
        for linear, weight in zip(self._linears, self._plain, strict=True):
            F.linear(self._input(linear), weight)
            if self._backward:
                torch.mm(self._output(linear), weight)

    def _packed_pass(self) -> None:
        for linear in self._linears:
            linear.product(self._input(linear))
            if self._backward:
                linear.transposed_product(self._output(linear))

    def _input(self, linear: FrozenLinear) -> Tensor:
        return self._x[linear.in_features]

    def _output(self, linear: FrozenLinear) -> Tensor:
        return self._x[linear.out_features]


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
