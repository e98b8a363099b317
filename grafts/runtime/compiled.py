"""The frozen linear in bf16 on a CPU that the dense op is for, which adds the branches beside its products."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from polygraft.grafts.runtime.linear import FrozenLinear, Hiddens
from polygraft.kernels.branch.op import add_branch_, branch_gradients
from polygraft.kernels.dense.op import MASK_DERIVATIVE, Weights, Work, linear, outer, supports, transposed


class CompiledLinear(FrozenLinear):
    """With `prepack` weights lie as serving's few rows read them fastest, and plain too once a gradient asks for it;
    else one plain copy serves both directions. Rows do not depend on their neighbours, whatever their count."""

    fuses = True

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, prepack: bool) -> None:
        super().__init__(weights, biases, prepack=False)
        self._weights = Weights.plain(self._weight, self.widths)
        self._plain: Weights | None = self._weights
        if prepack:
            self._weights, self._plain = Weights.packed(weights), None
            self._weight = self._weight.new_empty(0)

    def weight(self) -> Tensor:
        return self._weights.dense()

    def product(self, x_TI: Tensor) -> Tensor:
        return linear(x_TI, self._weights)[0]

    def product_alone(self, x_TI: Tensor) -> Tensor:
        return self.product(x_TI)

    def products(self, x_TI: Tensor, work: Work) -> tuple[list[Tensor], Work]:
        return self._split(linear(x_TI, self._weights, work)[0]), ()

    def recorded(self, x_TI: Tensor, work: Work) -> tuple[list[Tensor], Hiddens]:
        out, kept = linear(x_TI, self._weights, [pair for pair in work if pair[0].act in MASK_DERIVATIVE], keep=True)
        products, values = self._split(out), iter(kept)
        return products, [
            [next(values)]
            if b.act in MASK_DERIVATIVE
            else add_branch_(products[b.member], x_TI, b.A, b.B, segments, b.act)
            for b, segments in work
        ]

    def gradients(
        self, dy_TO: Tensor, x_TI: Tensor | None, work: Work, hiddens: Hiddens
    ) -> tuple[Tensor, list[Tensor]]:
        own = [pair for pair in work if pair[0].act in MASK_DERIVATIVE]
        kept = [values[0] for (b, _), values in zip(work, hiddens) if b.act in MASK_DERIVATIVE]
        dx, dh = transposed(dy_TO, self._unpacked(), own, kept)
        found, columns, slopes = [], self._split(dy_TO), iter(dh)
        for (b, segments), values in zip(work, hiddens):
            assert x_TI is not None
            dy = columns[b.member]
            if b.act in MASK_DERIVATIVE:
                found += [outer(next(slopes), x_TI, segments, len(b.A)), outer(values[0], dy, segments, len(b.B))]
            else:
                found += branch_gradients(dy, x_TI, b.A, b.B, segments, b.act, values, dx)
        return dx, found

    def transposed_product(self, dy_TO: Tensor) -> Tensor:
        return transposed(dy_TO, self._unpacked())[0]

    def transposed_alone(self, dy_TO: Tensor) -> Tensor:
        return self.transposed_product(dy_TO)

    def _unpacked(self) -> Weights:
        if self._plain is None:
            self._plain = Weights.plain(self.weight(), self.widths)
        return self._plain


def frozen_linear(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, prepack: bool, block: int | None
) -> FrozenLinear:
    """The fastest for these weights on this machine; `block` means what it does for `FrozenLinear`."""
    if all(map(supports, weights)):
        return CompiledLinear(weights, biases, prepack=prepack)
    return FrozenLinear(weights, biases, prepack=prepack, block=block)
