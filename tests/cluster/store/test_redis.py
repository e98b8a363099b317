"""A real Valkey server keeps the store's contract, and its data when it is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from polygraft.cluster.model import START
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, StoreUnavailable, StreamKey, Write
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.cluster.store.lists import relist
from polygraft.cluster.store.redis import RedisStore
from tests.cluster.builders import make_job
from tests.contracts.store import StoreContract, event, versions

A = make_job("a")
STREAM = StreamKey("s")


class TestRedisStore(StoreContract):
    @pytest.fixture
    def store(self, valkey: EmbeddedServer, request: pytest.FixtureRequest) -> Iterator[Store]:
        store = RedisStore(valkey.url, prefix=f"{request.node.name}:")
        yield store
        store.close()


def test_what_was_acknowledged_survives_a_killed_server(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "store") as server:
        store = connect(server.url)
        lease = store.acquire("controller", "one", 30.0)
        assert lease is not None
        version = store.commit([Write(keys.job(A.id), A, 0)], [event(1)], fence=lease.fence).version
        store.append(STREAM, {"n": 1})
        store.durable()

        os.kill(server.pid, signal.SIGKILL)
        wait_until_dead(server)
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.get(keys.job(A.id))
        with pytest.raises(StoreUnavailable):
            store.events(START, wait_s=5.0)
        assert time.monotonic() - began < 20.0

        server.start()
        found = store.get(keys.job(A.id))
        assert found is not None and (found.value, found.version) == (A, version)
        assert versions(store.events(START)) == [1]
        assert [entry for _, entry in store.read(STREAM)] == [{"n": 1}]
        assert store.commit([Write(keys.job(A.id), A, version)], [event(2)], fence=lease.fence).version > version
        assert store.renew(lease)


def test_a_server_that_hangs_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polygraft.cluster.store.wire.TIMEOUT_S", 0.3)
    with EmbeddedServer(tmp_path / "store") as server:
        store = connect(server.url)
        store.ping()
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(StoreUnavailable):
                store.ping()
        finally:
            os.kill(server.pid, signal.SIGCONT)
        store.ping()


def test_a_server_that_may_lose_writes_is_refused(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "store") as server:
        store = RedisStore(server.url)
        store._wire.call("CONFIG", "SET", "appendonly", "no")
        with pytest.raises(StoreUnavailable, match="appendonly yes"):
            store.commit([Write(keys.job(A.id), A, 0)])


def test_an_unknown_url_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="'mysql' is not a store; choices: redis://"):
        connect("mysql://x")


def wait_until_dead(server: EmbeddedServer) -> None:
    deadline = time.monotonic() + 5.0
    while server.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.alive


def test_records_that_an_older_version_wrote_are_put_into_their_lists_once(valkey: EmbeddedServer) -> None:
    store = RedisStore(valkey.url, prefix="older:")
    job = make_job()
    store.commit([Write(keys.job(job.id), job, 0)])
    listing = keys.jobs_of(job.tenant)
    with redis.Redis.from_url(valkey.url) as server:
        server.delete(f"older:list:{listing}")
        server.hdel(f"older:record:{keys.job(job.id)}", "listed")
    assert store.newest(listing) == []
    relist(store)
    assert [one.value for one in store.newest(listing)] == [job]
    version = store.newest(listing)[0].version
    relist(store)
    assert store.newest(listing)[0].version == version
    store.close()
