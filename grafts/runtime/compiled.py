"""The frozen linear of a CPU with AMX: products by the dense op, which adds the branches beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from polygraft.grafts.runtime.linear import FrozenLinear
from polygraft.kernels.dense.op import Packed, Side, linear, supports

if TYPE_CHECKING:
    from polygraft.grafts.runtime.linear import Work


class CompiledLinear(FrozenLinear):
    """One packed copy of the weights for products, and one of their transpose once a gradient asks for it. Rows do not
    depend on their neighbours, whatever their count."""

    fuses = True

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        super().__init__(weights, biases, prepack=False)
        self._packed = Packed.of(weights)
        self._weight = self._weight.new_empty(0)
        self._transposed: Packed | None = None

    def weight(self) -> Tensor:
        return self._packed.dense()

    def product(self, x_TI: Tensor) -> Tensor:
        return linear(x_TI, self._packed)

    def product_alone(self, x_TI: Tensor) -> Tensor:
        return self.product(x_TI)

    def products(self, x_TI: Tensor, work: Work) -> tuple[list[Tensor], Work]:
        sides = [Side(b.member, b.A, b.B, segments, b.act) for b, segments in work]
        return list(linear(x_TI, self._packed, sides).split_with_sizes(self.widths, dim=1)), ()

    def transposed_product(self, dy_TO: Tensor) -> Tensor:
        if not supports(self._weight.new_empty(0, self.out_features)):
            return dy_TO @ self.weight()
        if self._transposed is None:
            self._transposed = Packed.of([self.weight().T])
        return linear(dy_TO, self._transposed)

    def transposed_alone(self, dy_TO: Tensor) -> Tensor:
        return self.transposed_product(dy_TO)


def frozen_linear(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, prepack: bool, block: int | None
) -> FrozenLinear:
    """The fastest for these weights on this machine; prepacked and blockwise mean what they do for `FrozenLinear`."""
    if prepack and all(map(supports, weights)):
        return CompiledLinear(weights, biases)
    return FrozenLinear(weights, biases, prepack=prepack, block=block)
