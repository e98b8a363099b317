"""The frozen linear on a GPU: the library's products, and the branches by our programs, which differentiate
themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polygraft.grafts.runtime.fused import RoutedBranches
from polygraft.grafts.runtime.linears.protocol import FrozenLinear, Kept, Products, Recorded, joined
from polygraft.kernels.dense.op import Work


class GpuLinear(FrozenLinear):
    """One plain copy for both directions."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        super().__init__(weights, biases)
        self._weight = joined(weights)

    def records(self, x_TI: Tensor) -> bool:
        return False

    def weight(self) -> Tensor:
        return self._weight

    def product(self, x_TI: Tensor) -> Tensor:
        return torch.mm(x_TI, self._weight.T)

    def transposed_product(self, dy_TO: Tensor) -> Tensor:
        return torch.mm(dy_TO, self._weight)

    def forward(self, x_TI: Tensor, branches: RoutedBranches) -> Products:
        return Products(self.split(self.product(x_TI)), branches.work)

    def record(self, x_TI: Tensor, branches: RoutedBranches) -> Recorded:
        return Recorded(self.product(x_TI))

    def backward(
        self, dy_TO: Tensor, x_TI: Tensor | None, work: Work, kept: Kept
    ) -> tuple[Tensor, list[Tensor | None]]:
        return self.transposed_product(dy_TO), []
