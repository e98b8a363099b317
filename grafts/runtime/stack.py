"""The tensors of one op key at one site, those of all resident grafts side by side, and which rows are whose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from polygraft.grafts.runtime.keys import OpKey
from polygraft.grafts.sizes import TensorSpec


class StackSlice(NamedTuple):
    """Stack rows [first, last) belong to resident `graft`; `ends` are how many of a prompt's first and last tokens pass
    them, (0, 0) for all rows. `absent` says whether none does in the forward at hand; None: never."""

    graft: int
    first: int
    last: int
    scale: float = 1.0
    dropout: float = 0.0
    ends: tuple[int, int] = (0, 0)
    absent: Callable[[], bool] | None = None


@dataclass(frozen=True)
class StackSlices:
    """The slices of a stack, or some of them; equal ones share what a forward derives for its rows."""

    items: tuple[StackSlice, ...] = ()

    @cached_property
    def _hash(self) -> int:
        return hash(self.items)

    def __hash__(self) -> int:  # asked for at every site of every step
        return self._hash

    def __iter__(self) -> Iterator[StackSlice]:
        return iter(self.items)

    def __bool__(self) -> bool:
        return bool(self.items)

    @property
    def grafts(self) -> frozenset[int]:
        return frozenset(one.graft for one in self.items)

    def without(self, others: Iterable[StackSlice]) -> StackSlices:
        left = set(others)
        return StackSlices(tuple(one for one in self.items if one not in left))


@dataclass(frozen=True, slots=True)
class Stack:
    """The tensors of one key at one site, [rows of all its grafts, width] by part, and whose rows are where: those of
    its first part in `slices`, those of gates in `gates`."""

    key: OpKey
    slices: StackSlices
    parts: Mapping[str, Tensor]
    gates: StackSlices = StackSlices()


class OperandView(NamedTuple):
    """Where a resident's operand lies: rows [first, last) of `stack`."""

    tensor: TensorSpec
    stack: Tensor
    first: int
    last: int

    def rows(self) -> Tensor:
        return self.stack.detach()[self.first : self.last]

    def gradient(self) -> Tensor | None:
        """The rows' share of the stack's gradient, None before a backward reached the site."""
        return None if self.stack.grad is None else self.stack.grad[self.first : self.last]
