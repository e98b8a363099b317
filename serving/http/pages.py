"""One page of a list, cut by the last id of the page before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from polygraft.cluster.validation import shown
from polygraft.serving.http.errors import bad_request
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
            raise bad_request(f"after: {shown(after)} is not in this list", param="after")
    data = tuple(items[start : start + limit])
    return Page(
        data=data,
        has_more=start + limit < len(items),
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )
