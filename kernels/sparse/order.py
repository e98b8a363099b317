"""Which entries of a stack meet one row of S, or one column: the index sorted, once for all calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Order:
    """The entries of an index by their place on one side of S (0: rows, 1: columns), those of one place in stack order.

    key [N] int64, ascending: place * N + where the entry lies in the stack; entry [N] int64: the latter; other [N]
    int64: the place on the other side, where the index has two. The entries of one place and of stack rows [first,
    last) lie together, for any first and last.
    """

    key_N: Tensor
    entry_N: Tensor
    other_N: Tensor

    @staticmethod
    def of(i_NP: Tensor, side: int) -> Order:
        """The order, kept with the index, which is taken not to change: a graft's is chosen before its first step."""
        kept: dict[int, Order] = i_NP.__dict__.setdefault("_orders", {})
        if side not in kept:
            count = len(i_NP)
            key = (i_NP[:, side] * count + torch.arange(count, device=i_NP.device)).sort().values
            entry = key % count
            kept[side] = Order(key, entry, i_NP[entry, -1 - side])
        return kept[side]

    def bounds(self, edges_G2: Tensor, width: int) -> Tensor:
        """[G, 2, width] int32: the entries [low, high) of this order that lie in stack rows [first, last), the edges of
        G, and at each place of the `width`."""
        first = torch.arange(width, device=self.key_N.device) * len(self.key_N)
        return torch.searchsorted(self.key_N, edges_G2.unsqueeze(2) + first, out_int32=True)
