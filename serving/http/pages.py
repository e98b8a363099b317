"""One page of a list, cut by the last id of the page before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from polygraft.cluster.validation import shown
from polygraft.serving.http.errors import ApiError, bad_request
from polygraft.serving.http.schemas import Page


class Identified(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=Identified)


def page(items: Sequence[Item], *, after: str | None, limit: int) -> Page[Item]:
    """Up to `limit` of `items` that follow the one called `after`. Raises ApiError 400 when that one is not there."""
    start = 0
    if after is not None:
        start = next((index + 1 for index, item in enumerate(items) if item.id == after), -1)
        if start < 0:
            raise not_in_list(after)
    return first_of(items[start:], limit)


def first_of(items: Sequence[Item], limit: int) -> Page[Item]:
    """Up to `limit` of `items`, which have one more where the list goes on."""
    data = tuple(items[:limit])
    return Page(
        data=data,
        has_more=len(items) > limit,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


def not_in_list(after: str) -> ApiError:
    return bad_request(f"after: {shown(after)} is not in this list", param="after")
