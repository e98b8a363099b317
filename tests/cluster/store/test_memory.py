"""The in-memory twin keeps the store's contract."""

from __future__ import annotations

import pytest

from polygraft.cluster.store import keys
from polygraft.cluster.store.base import IDEMPOTENCY_S, Store, StoreUnavailable, Write
from polygraft.cluster.store.memory import MemoryStore
from tests.cluster.builders import make_job
from tests.contracts.store import StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


def test_a_closed_store_is_unavailable() -> None:
    store = MemoryStore()
    store.close()
    with pytest.raises(StoreUnavailable):
        store.ping()


def test_an_idempotency_key_is_forgotten_after_a_day() -> None:
    now = 0.0
    store = MemoryStore(clock=lambda: now)
    jobs = [make_job("a"), make_job("b")]
    for job in jobs:
        assert store.submit("t/1", job.id, [Write(keys.job(job.id), job, 0)]).created
        now += IDEMPOTENCY_S + 1
        assert store.submitted("t/1", job.id) is None
