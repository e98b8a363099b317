"""A submission that is carried out once, however often it comes with the same Idempotency-Key."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import TypeVar

from pydantic import JsonValue

from polygraft.cluster.events import Event
from polygraft.cluster.model import Job, Search
from polygraft.cluster.store.base import IdempotencyConflict, Store, Write
from polygraft.cluster.validation import shown
from polygraft.serving.http.errors import ApiError, not_found

Made = TypeVar("Made", Job, Search)
New = Callable[[], tuple[Sequence[Write], Sequence[Event]]]


def once(store: Store, kind: type[Made], scope: str, body: JsonValue, idempotency_key: str | None, new: New) -> Made:
    """The record of the first of `new`'s writes, or of the same request before; on disk when this returns.

    Keys are told apart within `scope`, which has the tenant. `new` makes all checks, and is not called for a request
    that came before: what they look at may have changed. Raises ApiError 409 for a key that came with another body.
    """
    key = None if idempotency_key is None else f"{scope}/{idempotency_key}"
    digest = sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    made: object = None
    try:
        first = None if key is None else store.submitted(key, digest)
        if first is None:
            writes, events = new()
            submitted = store.submit(key, digest, writes, events)
            first, made = submitted.key, writes[0].value if submitted.created else None
    except IdempotencyConflict:
        message = f"Idempotency-Key: {shown(idempotency_key)} was used for a different request; use a new one"
        raise ApiError(409, message, param="Idempotency-Key", code="idempotency_conflict") from None
    store.durable()
    if made is None and (found := store.get(first)) is not None:
        made = found.value
    if not isinstance(made, kind):
        raise not_found(kind.__name__.lower(), first, param=None)
    return made
