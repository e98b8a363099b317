"""The frozen linear: one weight in the layouts that its two GEMMs want, and never a gradient for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.kernels.branch.op import add_branch_, branch_gradients
from polygraft.kernels.dense.op import Work

Hiddens = Sequence[Sequence[Tensor]]  # what every branch beside a product keeps of a forward for its gradients

GRAIN, FLOOR = 8, 16  # rows of every forward are a multiple of 8 and at least 16
BLOCK = 256  # rows of one product in training; with AMX, 128 cost 6% of a packed step of 512 rows
HEAD_BLOCK = 128  # the same for the LM head, whose products are the largest tensors of a step


def padded(rows: int) -> int:
    """Rows after padding under the row-invariance contract."""
    return max(FLOOR, -(-rows // GRAIN) * GRAIN)


class FrozenLinear:
    """y = x W^T + bias with W [out, in] frozen; several projections of one input may be fused, `widths` being their
    row ranges.

    With `prepack`, bf16 and fp32 weights lie prepacked for oneDNN (the plain copy is dropped; reordering it each call
    is what makes small-row linears slow), and the transpose is packed when the first gradient asks for it. Without it
    one plain copy serves both directions: half the memory, and at hundreds of rows nearly the same speed in bf16.

    With `block`, every product on CPU is of exactly that many rows, the last of them padded. oneDNN sums over the inner
    dimension in an order that it chooses by the row count (seen with AMX); at one row count there is one order, so a
    row's result cannot depend on how many rows are beside it.
    """

    fuses = False  # whether `products` adds branches on a CPU

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        prepack: bool = True,
        block: int | None = None,
    ) -> None:
        weight = weights[0].detach().contiguous() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
        self.out_features, self.in_features = weight.shape
        self.widths = tuple(len(w) for w in weights)
        self.dtype = weight.dtype
        wide = torch.promote_types(self.dtype, torch.float32)
        self.row_sq = torch.cat([w.to(wide).square().sum(1) for w in torch.split(weight, 512)])
        some = any(bias is not None for bias in biases)
        self.bias = (
            torch.cat([w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases)])
            if some
            else None
        )
        onednn = self.dtype in (torch.bfloat16, torch.float32) and weight.device.type == "cpu"
        self._block = block if onednn else None
        self._weight = pack(weight) if prepack else weight
        self._transpose: Tensor | None = None

    def weight(self) -> Tensor:
        """The plain W [out, in], read back from its packed layout."""
        return self._weight.to_dense() if self._weight.is_mkldnn else self._weight

    def product(self, x_TI: Tensor) -> Tensor:
        """x W^T without the bias, [T, out]."""
        return self._blockwise(x_TI, self._weight, self.out_features)

    def product_alone(self, x_TI: Tensor) -> Tensor:
        """The same as one product, for rows that are one graft's and whose count is never another."""
        return multiply(x_TI, self._weight)

    def products(self, x_TI: Tensor, work: Work) -> tuple[list[Tensor], Work]:
        """x W_m^T for every projection m, and of the branches beside them those that are still to be added; where no
        gradient will be asked for."""
        return self._split(self.product(x_TI)), work

    def recorded(self, x_TI: Tensor, work: Work) -> tuple[list[Tensor], Hiddens]:
        """x W_m^T plus the branches for every projection m, and what `gradients` needs of them."""
        products = self._split(self.product(x_TI))
        return products, [add_branch_(products[b.member], x_TI, b.A, b.B, segments, b.act) for b, segments in work]

    def gradients(
        self, dy_TO: Tensor, x_TI: Tensor | None, work: Work, hiddens: Hiddens
    ) -> tuple[Tensor, list[Tensor]]:
        """dx, and dA and dB of every branch in turn; x is None where there is none."""
        # Each member's columns of dy, however they came: a product's order of sums may depend on the layout, too.
        dx, columns = self.transposed_product(dy_TO), self._split(dy_TO)
        found: list[Tensor] = []
        for (b, segments), hidden in zip(work, hiddens):
            assert x_TI is not None
            found += branch_gradients(columns[b.member], x_TI, b.A, b.B, segments, b.act, hidden, dx)
        return dx, found

    def output(self, x_TI: Tensor) -> Tensor:
        """x W^T + bias, [T, out]."""
        product = self.product(x_TI)
        return product if self.bias is None else product.add_(self.bias)

    def transposed_product(self, dy_TO: Tensor) -> Tensor:
        """dy W, [T, in]."""
        return self._blockwise(dy_TO, self._back(), self.in_features)

    def transposed_alone(self, dy_TO: Tensor) -> Tensor:
        """The same as one product, as `product_alone`."""
        return multiply(dy_TO, self._back())

    def _back(self) -> Tensor:
        """W^T as `multiply` takes it."""
        if not self._weight.is_mkldnn:
            return self._weight.T
        if self._transpose is None:
            self._transpose = pack(self.weight().T.contiguous())
        return self._transpose

    def _blockwise(self, rows: Tensor, weight: Tensor, width: int) -> Tensor:
        if self._block is None or len(rows) == self._block:
            return multiply(rows, weight)
        out = rows.new_empty(len(rows), width)
        for piece, into in zip(torch.split(rows, self._block), torch.split(out, self._block)):
            short = self._block - len(piece)
            if short or weight.is_mkldnn:
                into.copy_(multiply(F.pad(piece, (0, 0, 0, short)) if short else piece, weight)[: len(piece)])
            else:
                torch.mm(piece, weight.T, out=into)
        return out

    def _split(self, y_TO: Tensor) -> list[Tensor]:
        return [y_TO] if len(self.widths) == 1 else list(y_TO.split_with_sizes(self.widths, dim=1))

    def biases(self) -> tuple[Tensor | None, ...]:
        return (None,) * len(self.widths) if self.bias is None else self.bias.split_with_sizes(self.widths)


def pack(weight: Tensor) -> Tensor:
    """W [out, in] as `multiply` is fastest with for a few rows: in oneDNN's layout, where that computes its dtype."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float32):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight)  # type: ignore[no-any-return]


def multiply(x_TI: Tensor, weight: Tensor) -> Tensor:
    """x W^T, [T, out], for a weight packed or plain."""
    if not weight.is_mkldnn:
        return torch.mm(x_TI, weight.T)
    return torch.ops.mkldnn._linear_pointwise(x_TI.contiguous(), weight, None, "none", [], "")  # type: ignore[no-any-return]


def add_multiplied(y_TO: Tensor, x_TI: Tensor, weight: Tensor) -> Tensor:
    """y + x W^T, rounded once."""
    if not weight.is_mkldnn:
        return torch.addmm(y_TO, x_TI, weight.T)
    return torch.ops.mkldnn._linear_pointwise.binary(x_TI, y_TO, weight, None, "add")  # type: ignore[no-any-return]
