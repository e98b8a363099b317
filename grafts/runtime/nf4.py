"""NF4 with double quantisation, as a layout of the frozen linear (QLoRA; Dettmers et al. 2023, arXiv 2305.14314, eq.
5-6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polygraft.grafts.runtime.linear import FrozenLinear, multiply

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

GROUP = 64  # weights that share a scale; the scales themselves are of 8 bits, 256 of which share one


@dataclass(frozen=True, slots=True)
class Nf4:
    """A matrix as bitsandbytes quantises it: half a byte a weight, and about an eighth of a bit for the scales."""

    codes: Tensor
    state: QuantState
    dtype: torch.dtype

    @staticmethod
    def of(weight: Tensor) -> Nf4:
        from bitsandbytes.functional import quantize_4bit  # loaded only where a backbone is quantised

        held = weight.detach().contiguous()
        source = held.float() if held.dtype == torch.float64 else held
        codes, state = quantize_4bit(source, blocksize=GROUP, compress_statistics=True, quant_type="nf4")
        return Nf4(codes, state, weight.dtype)

    def dense(self) -> Tensor:
        """The matrix that is computed with, in the dtype it was quantised from."""
        from bitsandbytes.functional import dequantize_4bit

        found: Tensor = dequantize_4bit(self.codes, self.state)
        return found.to(self.dtype)


class Nf4Linear(FrozenLinear):
    """A frozen linear whose weights are dense only while they are multiplied with, in either direction.

    Every projection of a fused one is quantised by itself, so that it has the codes it has in a model by itself.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, block: int | None = None) -> None:
        self._parts = [Nf4.of(weight) for weight in weights]
        super().__init__([part.dense() for part in self._parts], biases, prepack=False, block=block)
        self._weight = self._weight.new_empty(0)

    def weight(self) -> Tensor:
        return torch.cat([part.dense() for part in self._parts])

    def product(self, x_TI: Tensor) -> Tensor:
        return self._blockwise(x_TI, self.weight(), self.out_features)

    def product_alone(self, x_TI: Tensor) -> Tensor:
        return multiply(x_TI, self.weight())

    def transposed_product(self, dy_TO: Tensor) -> Tensor:
        return self._blockwise(dy_TO, self.weight().T, self.in_features)
