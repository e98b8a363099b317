"""The in-memory twin keeps the store's contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from polygraft.cluster.model import START
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import IDEMPOTENCY_S, Lease, Store, StoreUnavailable, Write
from polygraft.cluster.store.memory import MemoryStore
from tests.cluster.builders import make_job
from tests.contracts.store import StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


LEASE = Lease("leader", "me", 1, 1.0)
A = make_job("a")
ASKED: Mapping[str, Callable[[Store], object]] = {
    "ping": lambda store: store.ping(),
    "get": lambda store: store.get(keys.job(A.id)),
    "scan": lambda store: store.scan(keys.JOBS),
    "newest": lambda store: store.newest(keys.jobs_of(A.tenant)),
    "count": lambda store: store.count(keys.jobs_of(A.tenant)),
    "commit": lambda store: store.commit([]),
    "submit": lambda store: store.submit("t/1", "a", [Write(keys.job(A.id), A, 0)]),
    "submitted": lambda store: store.submitted("t/1", "a"),
    "acquire": lambda store: store.acquire("leader", "me", 1.0),
    "renew": lambda store: store.renew(LEASE),
    "release": lambda store: store.release(LEASE),
    "events": lambda store: store.events(START),
    "trim": lambda store: store.trim(START),
    "append": lambda store: store.append(keys.metrics(A.id), {}),
    "read": lambda store: store.read(keys.metrics(A.id)),
    "durable": lambda store: store.durable(),
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_a_closed_store_is_unavailable(asked: Callable[[Store], object]) -> None:
    store = MemoryStore()
    store.close()
    with pytest.raises(StoreUnavailable):
        asked(store)


def test_an_idempotency_key_is_forgotten_after_a_day() -> None:
    now = 0.0
    store = MemoryStore(clock=lambda: now)
    jobs = [make_job("a"), make_job("b")]
    for job in jobs:
        assert store.submit("t/1", job.id, [Write(keys.job(job.id), job, 0)]).created
        now += IDEMPOTENCY_S + 1
        assert store.submitted("t/1", job.id) is None
