"""Which entries of a stack meet one row of S, or one column: the index sorted, once for all calls."""

from __future__ import annotations

from dataclasses import dataclass, field

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

    def bounds(self, edges_G2: Tensor, width: int) -> Tensor:
        """[G, 2, width] int32: the entries [low, high) of this order that lie in stack rows [first, last), the edges of
        G, and at each place of the `width`."""
        first = torch.arange(width, device=self.key_N.device) * len(self.key_N)
        return torch.searchsorted(self.key_N, edges_G2.unsqueeze(2) + first, out_int32=True)


@dataclass(frozen=True, slots=True)
class SparseIndex:
    """Where the entries of a stack stand in S: places [N, 2] (row, column), or [N, 1] for whole rows, int64. They are
    taken not to change once an order has been asked for: a graft's are chosen before its first step."""

    places: Tensor
    _orders: dict[int, Order] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.places)

    def order(self, side: int) -> Order:
        """The entries by their place on one side of S, sorted once."""
        if side not in self._orders:
            count = len(self.places)
            key = (self.places[:, side] * count + torch.arange(count, device=self.places.device)).sort().values
            entry = key % count
            self._orders[side] = Order(key, entry, self.places[entry, -1 - side])
        return self._orders[side]
