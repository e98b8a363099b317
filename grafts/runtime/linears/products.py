"""Products with a frozen weight by the library: plain or in oneDNN's layout, whole or of a fixed number of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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


def blockwise(rows: Tensor, weight: Tensor, width: int, block: int | None) -> Tensor:
    """x W^T [T, width], every product being of exactly `block` rows, the last of them padded; None: of all at once.

    oneDNN sums over the inner dimension in an order that it chooses by the row count (seen with AMX); at one row count
    there is one order, so a row's result cannot depend on how many rows there are.
    """
    if block is None or len(rows) == block:
        return multiply(rows, weight)
    out = rows.new_empty(len(rows), width)
    for piece, into in zip(torch.split(rows, block), torch.split(out, block), strict=True):
        short = block - len(piece)
        if short or weight.is_mkldnn:
            into.copy_(multiply(F.pad(piece, (0, 0, 0, short)) if short else piece, weight)[: len(piece)])
        else:
            torch.mm(piece, weight.T, out=into)
    return out
