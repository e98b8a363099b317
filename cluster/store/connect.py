"""Which store a URL means."""

from __future__ import annotations

from polygraft.cluster.store.base import Store
from polygraft.cluster.store.memory import MemoryStore
from polygraft.cluster.store.redis import RedisStore


def connect(url: str, *, patient: bool = False) -> Store:
    """A store for `redis://[:password@]host:port/db` (rediss:// and unix:// too) or `memory://`, a new one each time.

    A `patient` one waits while the server refuses to write, its disk being full, instead of raising WriteRefused.
    Nothing is sent before the first call. Raises ValueError for another URL; `embedded` must be started first.
    """
    scheme = url.partition("://")[0]
    if scheme in ("redis", "rediss", "unix"):
        return RedisStore(url, patient=patient)
    if url == "memory://":
        return MemoryStore()
    choices = "redis://host:port/db, rediss://, unix://, memory://"
    raise ValueError(f"store_url: {scheme!r} is not a store; choices: {choices}")
