"""The frozen linear in bf16 on a CPU that the dense op is for, which adds the branches to its products."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from polygraft.grafts.runtime.fused import RoutedBranches
from polygraft.grafts.runtime.linears.protocol import FrozenLinear, Kept, Products, Recorded, joined
from polygraft.kernels.branch.op import add_branch_, branch_gradients
from polygraft.kernels.compiled.calls import Call
from polygraft.kernels.dense.op import MASK_DERIVATIVE, Outer, Weights, Work, linear, outers, ready, transposed


class CompiledLinear(FrozenLinear):
    """With `prepack` weights lie as serving's few rows read them fastest, and plain too once a gradient asks for it;
    else one plain copy serves both directions. Rows do not depend on their neighbours, whatever their count."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, prepack: bool) -> None:
        super().__init__(weights, biases)
        self._packed = Weights.packed(weights) if prepack else None
        self._plain = None if prepack else Weights.plain(joined(weights), self.widths)

    def records(self, x_TI: Tensor) -> bool:
        return True

    def weight(self) -> Tensor:
        return self._first().dense()

    def product(self, x_TI: Tensor) -> Tensor:
        return linear(x_TI, self._first())[0]

    def transposed_product(self, dy_TO: Tensor) -> Tensor:
        return transposed(dy_TO, self._unpacked())[0]

    def forward(self, x_TI: Tensor, branches: RoutedBranches) -> Products:
        return Products(self.split(linear(x_TI, self._first(), branches.work)[0]))

    def record(self, x_TI: Tensor, branches: RoutedBranches) -> Recorded:
        own = [pair for pair in branches.work if pair[0].act in MASK_DERIVATIVE]
        y, kept = linear(x_TI, self._first(), own, keep=True)
        if len(own) == len(branches.work):
            return Recorded(y, [[values] for values in kept])
        outputs, values = self.split(y), iter(kept)
        return Recorded(
            y,
            [
                [next(values)]
                if b.act in MASK_DERIVATIVE
                else add_branch_(outputs[b.member], x_TI, b.A, b.B, segments, b.act)
                for b, segments in branches.work
            ],
        )

    def ready(self, x_TI: Tensor, branches: RoutedBranches, out_TO: Tensor) -> Call | None:
        return ready(x_TI, self._first(), branches.work, out_TO)

    def backward(
        self, dy_TO: Tensor, x_TI: Tensor | None, work: Work, kept: Kept
    ) -> tuple[Tensor, list[Tensor | None]]:
        own = [pair for pair in work if pair[0].act in MASK_DERIVATIVE]
        masks = [values[0] for (b, _), values in zip(work, kept, strict=True) if b.act in MASK_DERIVATIVE]
        dx, dh = transposed(dy_TO, self._unpacked(), own, masks)
        gradients: list[Tensor | None] = []
        columns, slopes = self.split(dy_TO), iter(dh)
        asked: list[tuple[int, Outer]] = []  # by the place of what it gives
        for (b, segments), values in zip(work, kept, strict=True):
            dy = columns[b.member]
            if b.act in MASK_DERIVATIVE:
                pairs = (b.A, next(slopes), x_TI), (b.B, values[0], dy)
                for weight, hidden, rows in pairs:
                    if weight.requires_grad:
                        assert rows is not None, "x is kept where an A is trained"
                        asked.append((len(gradients), Outer(hidden, rows, segments, weight.shape[0])))
                    gradients.append(None)
            else:
                gradients += branch_gradients(dy, x_TI, b.A, b.B, segments, b.act, values, dx)
        for (place, _), gradient in zip(asked, outers([one for _, one in asked]), strict=True):
            gradients[place] = gradient
        return dx, gradients

    def _first(self) -> Weights:
        weights = self._packed or self._plain
        assert weights is not None
        return weights

    def _unpacked(self) -> Weights:
        if self._plain is None:
            self._plain = Weights.plain(self.weight(), self.widths)
        return self._plain
