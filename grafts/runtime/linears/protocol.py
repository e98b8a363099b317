"""What every frozen linear is: one or several projections of one input, whose weights never get a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polygraft.grafts.runtime.fused import RoutedBranches
from polygraft.kernels.compiled.calls import Call
from polygraft.kernels.dense.op import Work

Kept = Sequence[Sequence[Tensor]]  # what every branch keeps of a forward for its gradients


class Products(NamedTuple):
    """x W_m^T for every projection m with the branches that were fused into it, [T, width] each; the branches that are
    still to be added."""

    outputs: list[Tensor]
    rest: Work = ()


class Recorded(NamedTuple):
    """The products of all projections side by side, [T, out], with all branches; what `backward` needs of those."""

    y: Tensor
    kept: Kept = ()


class FrozenLinear(ABC):
    """y = x W^T + bias with W [out, in] frozen; `widths` are the row ranges of its projections.

    What all have is said of the weights here; the weights themselves lie in each implementation, as it multiplies them.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        self.widths = tuple(len(w) for w in weights)
        self.out_features, self.in_features = sum(self.widths), weights[0].shape[1]
        self.dtype = weights[0].dtype
        wide = torch.promote_types(self.dtype, torch.float32)
        self.row_sq = torch.cat([piece.to(wide).square().sum(1) for piece in torch.split(joined(weights), 512)])
        some = any(bias is not None for bias in biases)
        self.bias = (
            torch.cat([w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)])
            if some
            else None
        )

    @abstractmethod
    def weight(self) -> Tensor:
        """The plain W [out, in], read back from its layout."""

    @abstractmethod
    def records(self, x_TI: Tensor) -> bool:
        """Whether the branches' forward and backward are this linear's work, in one step of autograd with its own; else
        they are the branch op's, which differentiates itself."""

    @abstractmethod
    def forward(self, x_TI: Tensor, branches: RoutedBranches) -> Products:
        """The products of which nothing is recorded."""

    @abstractmethod
    def record(self, x_TI: Tensor, branches: RoutedBranches) -> Recorded:
        """The products for a `backward`; where it does not `records`, there are no branches."""

    @abstractmethod
    def backward(
        self, dy_TO: Tensor, x_TI: Tensor | None, work: Work, kept: Kept
    ) -> tuple[Tensor, list[Tensor | None]]:
        """dx, and dA and dB of every branch in turn, None for one that is not trained; x is None where no A is."""

    def ready(self, x_TI: Tensor, branches: RoutedBranches, out_TO: Tensor) -> Call | None:
        """The compiled call that writes the products with all branches to `out`; None where there is none for them."""
        return None

    @abstractmethod
    def product(self, x_TI: Tensor) -> Tensor:
        """x W^T without the bias, [T, out]."""

    @abstractmethod
    def transposed_product(self, dy_TO: Tensor) -> Tensor:
        """dy W, [T, in]."""

    def product_alone(self, x_TI: Tensor) -> Tensor:
        """x W^T as one product, for rows that are one graft's and whose count is never another."""
        return self.product(x_TI)

    def transposed_alone(self, dy_TO: Tensor) -> Tensor:
        """dy W likewise."""
        return self.transposed_product(dy_TO)

    def output(self, x_TI: Tensor) -> Tensor:
        """x W^T + bias, [T, out]."""
        product = self.product(x_TI)
        return product if self.bias is None else product.add_(self.bias)

    def split(self, y_TO: Tensor) -> list[Tensor]:
        """Each projection's columns, as views."""
        return [y_TO] if len(self.widths) == 1 else list(y_TO.split_with_sizes(self.widths, dim=1))

    def biases(self) -> tuple[Tensor | None, ...]:
        return (None,) * len(self.widths) if self.bias is None else self.bias.split_with_sizes(self.widths)


def joined(weights: Sequence[Tensor]) -> Tensor:
    """W [out of all, in], without a copy where there is but one."""
    return weights[0].detach().contiguous() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
