"""Records and events of older schemas, brought to the fields of the next before they are decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from polygraft.cluster.store.base import JSON
from polygraft.grafts.grammar import parse
from polygraft.grafts.spec import SpecError

Body = Mapping[str, JSON]


def _graft_1(body: Body) -> Body:
    """Schema 2 keeps the context length."""
    return {**body, "context_length": _context_length(str(body.get("method")))}


def _graft_published_1(body: Body) -> Body:
    graft = body.get("graft")
    return {**body, "graft": _graft_1(graft) if isinstance(graft, Mapping) else graft}


@lru_cache(maxsize=1024)
def _context_length(method: str) -> int:
    """0 for an imported graft that is described in words: the engine asks the graft, and refuses what does not fit."""
    try:
        return parse(method).context_length
    except SpecError:
        return 0


# From (type, schema) to the body of schema + 1.
UPGRADES: Mapping[tuple[str, int], Callable[[Body], Body]] = {
    ("Graft", 1): _graft_1,
    ("GraftPublished", 1): _graft_published_1,
}
