"""The workers of one pack, a device each: how they agree on what comes next and share what they computed.

Gradients travel one by one and are added by every rank in the order of their micro-batches, as one rank alone would: a
ring sum would add them in an order that hangs on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class RankLost(Exception):
    """Another worker of the pack is gone or does not answer, which is no job's fault."""


class Ranks(Protocol):
    """Everyone calls the same methods in the same order. Raises RankLost."""

    rank: int
    size: int

    def tell(self, order: T | None) -> T:
        """What rank 0 says; the others give None."""
        ...

    def share(self, mine: T) -> list[T]:
        """What each rank says, by rank."""
        ...

    def copy(self, tensor: Tensor, source: int) -> None:
        """Make the tensor what it is on rank `source`."""
        ...


class Alone:
    """The only worker of its pack."""

    rank, size = 0, 1

    def tell(self, order: T | None) -> T:
        assert order is not None, "rank 0 says something"
        return order

    def share(self, mine: T) -> list[T]:
        return [mine]

    def copy(self, tensor: Tensor, source: int) -> None:
        pass


class ProcessGroup:
    """The ranks of torch's default process group, which is initialised."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def tell(self, order: T | None) -> T:
        said: list[T | None] = [order]
        _reached(lambda: dist.broadcast_object_list(said, src=0))
        return cast("T", said[0])

    def share(self, mine: T) -> list[T]:
        said: list[T | None] = [None] * self.size
        _reached(lambda: dist.all_gather_object(said, mine))
        return cast("list[T]", said)

    def copy(self, tensor: Tensor, source: int) -> None:
        _reached(lambda: dist.broadcast(tensor, src=source))


def _reached(send: Callable[[], object]) -> None:
    try:
        send()
    except RuntimeError as error:  # all that torch says of a peer that is gone
        raise RankLost(f"another worker of the pack does not answer: {error}") from error
