"""The frozen linear by torch's own products on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polygraft.grafts.runtime.fused import RoutedBranches
from polygraft.grafts.runtime.linears.branches import add_branches_, backward
from polygraft.grafts.runtime.linears.products import blockwise, multiply, pack
from polygraft.grafts.runtime.linears.protocol import FrozenLinear, Kept, Products, Recorded, joined
from polygraft.kernels.branch.cost import stacking_pays
from polygraft.kernels.branch.op import serve_branch_
from polygraft.kernels.dense.op import Work


class PlainLinear(FrozenLinear):
    """With `prepack`, bf16 and fp32 weights lie prepacked for oneDNN (the plain copy is dropped; reordering it each
    call is what makes small-row linears slow), and the transpose is packed when the first gradient asks for it. Without
    it one plain copy serves both directions: half the memory, and at hundreds of rows nearly the same speed in bf16.

    With `block`, every product in bf16 or fp32 is of exactly that many rows (`products.blockwise`).
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        prepack: bool = True,
        block: int | None = None,
    ) -> None:
        super().__init__(weights, biases)
        self._block = block if self.dtype in (torch.bfloat16, torch.float32) else None
        self._weight = pack(joined(weights)) if prepack else joined(weights)
        self._transpose: Tensor | None = None

    def records(self, x_TI: Tensor) -> bool:
        return True

    def weight(self) -> Tensor:
        return self._weight.to_dense() if self._weight.is_mkldnn else self._weight

    def product(self, x_TI: Tensor) -> Tensor:
        return blockwise(x_TI, self._weight, self.out_features, self._block)

    def product_alone(self, x_TI: Tensor) -> Tensor:
        return multiply(x_TI, self._weight)

    def transposed_product(self, dy_TO: Tensor) -> Tensor:
        return blockwise(dy_TO, self._back(), self.in_features, self._block)

    def transposed_alone(self, dy_TO: Tensor) -> Tensor:
        return multiply(dy_TO, self._back())

    def forward(self, x_TI: Tensor, branches: RoutedBranches) -> Products:
        y = self.product(x_TI)
        if branches.trained:  # evaluation in training: as in a step
            return Products(self.split(y), branches.work)
        return Products(self.split(serve(y, x_TI, branches, self.widths)))

    def record(self, x_TI: Tensor, branches: RoutedBranches) -> Recorded:
        y = self.product(x_TI)
        return Recorded(y, add_branches_(self.split(y), x_TI, branches.work))

    def backward(
        self, dy_TO: Tensor, x_TI: Tensor | None, work: Work, kept: Kept
    ) -> tuple[Tensor, list[Tensor | None]]:
        return backward(self, dy_TO, x_TI, work, kept)

    def _back(self) -> Tensor:
        """W^T as `multiply` takes it."""
        if not self._weight.is_mkldnn:
            return self._weight.T
        if self._transpose is None:
            self._transpose = pack(self.weight().T.contiguous())
        return self._transpose


def serve(y_TO: Tensor, x_TI: Tensor, branches: RoutedBranches, widths: Sequence[int]) -> Tensor:
    """y plus all branches where no gradient will be asked for; those of an activation in the cheaper of two forms."""
    for act in dict.fromkeys(b.act for b, _ in branches.work):
        own = [(b, segments) for b, segments in branches.work if b.act == act]
        runs = [(run.count, run.rows, run.size) for _, segments in own for run in segments.runs]
        if stacking_pays(len(x_TI), branches.ranks(act), runs, x_TI.shape[1], y_TO.shape[1]):
            stacked, segments = branches.stacked(act, widths)
            y_TO = stacked.add(y_TO, x_TI, segments)
        else:
            products = y_TO.split_with_sizes(list(widths), dim=1)
            for b, segments in own:
                serve_branch_(products[b.member], x_TI, b.A, b.B, segments, act)
    return y_TO
