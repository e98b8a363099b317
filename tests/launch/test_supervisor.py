"""The supervisor over a real Valkey, and a stand-in for the head."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import redis

from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.launch.children import supervise
from polygraft.launch.leftovers import clear, remove_drafts
from polygraft.launch.processes import Identity, session
from polygraft.launch.run_folder import RunFolder, Supervision
from polygraft.launch.supervisor import EmbeddedStore
from tests.launch.test_supervision import read_pid, stand_in, wait_for


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path / "store")
    yield server
    server.stop()


def test_a_killed_store_comes_back_with_its_data_while_the_head_stays(tmp_path: Path, server: EmbeddedServer) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(supervise, [EmbeddedStore(server), stand_in(tmp_path, "head")], stop)
        try:
            head = read_pid(tmp_path / "head")
            client = redis.Redis.from_url(server.url)
            client.set("job", "kept")
            killed = server.pid
            os.kill(killed, signal.SIGKILL)
            wait_for(lambda: server.alive and server.pid != killed)
            wait_for(lambda: _get(client, "job") == b"kept")
            assert read_pid(tmp_path / "head") == head
            client.close()
        finally:
            stop.set()
        done.result(timeout=30)
    assert not server.alive
    assert not list(session(head))


def test_what_a_killed_supervisor_left_is_cleared_away(tmp_path: Path, server: EmbeddedServer) -> None:
    folder = RunFolder(tmp_path)
    server.start()
    head = stand_in(tmp_path, "head")
    head.start()
    read_pid(tmp_path / "head")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    gone = Identity(os.getpid(), psutil.Process().create_time() - 60.0)
    left = Supervision(gone, (Identity.of(server.pid), Identity.of(head.pid)), str(scratch))
    folder.supervise(left)
    assert folder.supervision == left
    assert clear(folder) == 2
    assert not server.alive and not head.alive and not list(session(head.pid)) and not scratch.exists()
    assert clear(folder) == 0


def test_a_live_supervisor_is_left_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    head = stand_in(tmp_path, "head")
    head.start()
    folder.supervise(Supervision(Identity.of(os.getpid()), (Identity.of(head.pid),), str(tmp_path / "scratch")))
    assert clear(folder) == 0
    assert head.alive
    head.end()


def test_what_killed_writers_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = [
        tmp_path / "grafts" / ".1f.draft-x" / "graft.safetensors",
        tmp_path / "jobs" / "ftjob-1" / ".checkpoint-00000001.draft-x" / "state.json",
        tmp_path / "files" / ".incoming" / "abc",
    ]
    kept = [tmp_path / "grafts" / "1f" / "graft.json", tmp_path / "files" / "file-1.jsonl"]
    young = tmp_path / "files" / ".incoming" / "young"
    for path in (*left, *kept, young):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    now = time.time() + 7200
    os.utime(young, (now, now))
    assert remove_drafts(tmp_path, now=now) == len(left)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted((*kept, young))


def _get(client: redis.Redis, key: str) -> object:
    try:
        return client.get(key)
    except redis.ConnectionError:
        return None
