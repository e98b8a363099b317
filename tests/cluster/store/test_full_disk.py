"""The embedded server on a real disk that fills up: it refuses to write, reads on, loses nothing, and comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from polygraft.cluster.api_keys import create_key, verify_key
from polygraft.cluster.model import TenantId
from polygraft.cluster.store.base import Store, StreamKey, WriteRefused
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.cluster.store.watch import LITTLE_BYTES
from tests.small_disk import SmallDisk, small_disk

STREAM = StreamKey("metrics")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", mib=14) as disk:
        yield disk


@pytest.fixture
def server(disk: SmallDisk) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(disk.folder / "store") as server:
        yield server


def make_key(store: Store) -> str:
    return create_key(store, tenant=TenantId("t"), name="k", at=0.0)[1]


def test_with_little_room_writes_are_refused_reads_go_on_and_room_brings_writes_back(
    disk: SmallDisk, server: EmbeddedServer
) -> None:
    store, pid = connect(server.url), server.pid
    kept = make_key(store)
    disk.fill(leaving=LITTLE_BYTES - (1 << 20))
    until(lambda: refused(store))
    disk.fill()
    assert refused(store)
    assert verify_key(store, kept) is not None
    disk.make_room()
    until(lambda: not refused(store))
    assert server.pid == pid and server.alive


def test_one_that_filled_up_too_fast_comes_back_reading_with_all_that_was_acknowledged(
    disk: SmallDisk, server: EmbeddedServer
) -> None:
    assert server._watch is not None
    server._watch.stop()  # as if it had not looked in time
    store = connect(server.url)
    disk.fill(leaving=32 << 10)
    acknowledged = []
    with pytest.raises(Exception, match="does not answer"):  # noqa: PT012  (as many writes as there is room for)
        while True:
            acknowledged.append(make_key(store))
    until(lambda: not server.alive)
    server.start()
    store = connect(server.url)
    assert len(acknowledged) > 2 and all(verify_key(store, key) for key in acknowledged)
    assert refused(store)
    disk.make_room()
    until(lambda: not refused(store))
    assert make_key(store)


def test_a_patient_writer_waits_until_its_write_is_taken(disk: SmallDisk, server: EmbeddedServer) -> None:
    hasty, patient = connect(server.url), connect(server.url, patient=True)
    disk.fill(leaving=LITTLE_BYTES - (1 << 20))
    until(lambda: refused(hasty))
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(make_key, patient), threads.submit(patient.append, STREAM, {"step": 1})]
        time.sleep(0.2)
        assert not any(one.done() for one in waiting)  # type: ignore[attr-defined]
        disk.make_room()
        key = waiting[0].result(timeout=10)  # type: ignore[attr-defined]
    assert verify_key(hasty, str(key)) is not None
    assert [entry for _, entry in hasty.read(STREAM)] == [{"step": 1}]


def refused(store: Store) -> bool:
    try:
        store.durable()
        return False
    except WriteRefused:
        return True


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)
