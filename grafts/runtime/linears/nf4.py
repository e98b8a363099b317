"""NF4 with double quantisation, as a layout of the frozen linear (QLoRA; Dettmers et al. 2023, arXiv 2305.14314, eq.
5-6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polygraft.grafts.methods.compressed.quantisation import Quantisation
from polygraft.grafts.runtime.fused import RoutedBranches
from polygraft.grafts.runtime.linears.branches import add_branches_, backward
from polygraft.grafts.runtime.linears.plain import serve
from polygraft.grafts.runtime.linears.products import blockwise, multiply
from polygraft.grafts.runtime.linears.protocol import FrozenLinear, Kept, Products, Recorded
from polygraft.kernels.common.segments import Segments
from polygraft.kernels.dense.op import FusedBranch, Work
from polygraft.kernels.nf4.op import linear

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

        weight: Tensor = dequantize_4bit(self.codes, self.state)
        return weight.to(self.dtype)

    def absmax(self) -> Tensor:
        """The blocks' scales [weights / 64] in float32, as `dequantize_4bit` makes them from their 8 bits.

        Made for every product, which costs an eighth of what reading the codes does: kept, they would take back the
        third of a bit a weight that the double quantisation saves.
        """
        from bitsandbytes.functional import dequantize_blockwise

        scales: Tensor = dequantize_blockwise(self.state.absmax, self.state.state2) + self.state.offset
        return scales.float()


def quantised(weight: Tensor, how: Quantisation) -> Nf4:
    """Q_T of LoftQ's algorithm 1 (Li et al. 2023, arXiv 2310.08659): Q_t rounds W - L_t-1, with L_t the best
    approximation of rank r of W - Q_t, and L_0 = 0."""
    nearest, wide = Nf4.of(weight), weight.detach().float()
    for _ in range(how.iterations - 1):
        rounded = Nf4.of(wide - _largest(wide - nearest.dense().float(), how.rank))
        nearest = replace(rounded, dtype=weight.dtype)
    return nearest


def _largest(lost: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank: onto the first left singular vectors, which are eigenvectors of the smaller
    square."""
    tall = len(lost) > lost.shape[1]
    narrow = (lost.T if tall else lost).double()
    U = torch.linalg.eigh(narrow @ narrow.T)[1][:, -rank:]
    near: Tensor = (U @ (U.T @ narrow)).to(lost)
    return near.T if tall else near


class Nf4Linear(FrozenLinear):
    """A frozen linear whose weights are dense only while they are multiplied with, in either direction; on a GPU the
    product x W^T reads the codes.

    Every projection of a fused one is quantised by itself, so that it has the codes it has in a model by itself.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        block: int | None = None,
        quantisation: Quantisation = Quantisation(),
    ) -> None:
        parts = [quantised(weight, quantisation) for weight in weights]
        super().__init__([part.dense() for part in parts], biases)
        self._block = block if self.dtype in (torch.bfloat16, torch.float32) else None
        # Side by side, so that one product may read the codes of all.
        self._codes = torch.cat([part.codes for part in parts])
        views = self._codes.split_with_sizes([len(part.codes) for part in parts])
        self._parts = [replace(part, codes=codes) for part, codes in zip(parts, views, strict=True)]

    def records(self, x_TI: Tensor) -> bool:
        return not x_TI.is_cuda

    def weight(self) -> Tensor:
        return torch.cat([part.dense() for part in self._parts])

    def product(self, x_TI: Tensor) -> Tensor:
        if self._reads_codes(x_TI):
            return self._multiplied(x_TI, self._codes, self._parts)
        return blockwise(x_TI, self.weight(), self.out_features, None if x_TI.is_cuda else self._block)

    def product_alone(self, x_TI: Tensor) -> Tensor:
        return self.product(x_TI) if self._reads_codes(x_TI) else multiply(x_TI, self.weight())

    def transposed_product(self, dy_TO: Tensor) -> Tensor:
        return blockwise(dy_TO, self.weight().T, self.in_features, None if dy_TO.is_cuda else self._block)

    def transposed_alone(self, dy_TO: Tensor) -> Tensor:
        return multiply(dy_TO, self.weight().T)

    def forward(self, x_TI: Tensor, branches: RoutedBranches) -> Products:
        if x_TI.is_cuda:
            return self._on_gpu(x_TI, branches)
        y = self.product(x_TI)
        if branches.trained:
            return Products(self.split(y), branches.work)
        return Products(self.split(serve(y, x_TI, branches, self.widths)))

    def record(self, x_TI: Tensor, branches: RoutedBranches) -> Recorded:
        y = self.product(x_TI)
        return Recorded(y, add_branches_(self.split(y), x_TI, branches.work))

    def backward(
        self, dy_TO: Tensor, x_TI: Tensor | None, work: Work, kept: Kept
    ) -> tuple[Tensor, list[Tensor | None]]:
        return backward(self, dy_TO, x_TI, work, kept)

    def _on_gpu(self, x_TI: Tensor, branches: RoutedBranches) -> Products:
        """The products, each with one branch whose segments do not meet, where no gradient will be asked for."""
        fused: dict[int, tuple[FusedBranch, Segments]] = {}
        rest: list[tuple[FusedBranch, Segments]] = []
        for b, segments in branches.work:
            if b.member in fused or branches.trained or not segments.disjoint:
                rest.append((b, segments))
            else:
                fused[b.member] = b, segments
        if not fused or not self._reads_codes(x_TI):
            return Products(self.split(self.product(x_TI)), branches.work)
        parts = enumerate(self._parts)
        return Products([self._multiplied(x_TI, part.codes, [part], fused.get(m)) for m, part in parts], rest)

    def _reads_codes(self, x_TI: Tensor) -> bool:
        """Whether the op multiplies: on a GPU, where rows of W are whole blocks."""
        return x_TI.is_cuda and self.in_features % GROUP == 0

    def _multiplied(
        self, x_TI: Tensor, codes: Tensor, parts: Sequence[Nf4], branch: tuple[FusedBranch, Segments] | None = None
    ) -> Tensor:
        """x W^T for neighbouring parts, with a branch."""
        codes_OH = codes.view(-1, self.in_features // 2)
        absmax_OK = torch.cat([part.absmax() for part in parts]).view(-1, self.in_features // GROUP)
        if branch is None:
            none = x_TI.new_empty(0, self.in_features), x_TI.new_empty(0, len(codes_OH))
            return linear(x_TI, codes_OH, absmax_OK, *none, Segments(()))
        fused, segments = branch
        return linear(x_TI, codes_OH, absmax_OK, fused.A, fused.B, segments, fused.act)
