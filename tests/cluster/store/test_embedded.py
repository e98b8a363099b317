"""The embedded server: one a folder, a secret password, gone when stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from polygraft.cluster.store import embedded, watch, wire
from polygraft.cluster.store.base import StoreError, StoreUnavailable
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer


def test_a_folder_has_one_server_at_a_time(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path), pytest.raises(StoreError, match="another server runs on this folder"):
        EmbeddedServer(tmp_path).start()
    with EmbeddedServer(tmp_path) as server:
        connect(server.url).ping()


def test_the_password_is_needed_kept_and_nobodys_to_read(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server:
        password = tmp_path / "password"
        assert password.stat().st_mode & 0o777 == 0o600
        assert password.read_text() not in " ".join(psutil.Process(server.pid).cmdline())
        with pytest.raises(StoreUnavailable, match=r"(?i)auth"):
            connect(f"redis://127.0.0.1:{server.port}/0").ping()
        first = server.url
    with EmbeddedServer(tmp_path, port=server.port) as again:
        assert again.url == first


def test_a_stopped_server_leaves_no_process(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path).start()
    pid = server.pid
    server.stop()
    assert not server.alive and not psutil.pid_exists(pid)
    server.stop()


def test_a_server_that_cannot_start_says_why(tmp_path: Path, valkey: EmbeddedServer) -> None:
    with pytest.raises(StoreError, match=r"(?s)did not start.*in use"):
        EmbeddedServer(tmp_path, port=valkey.port).start()


def test_a_server_that_does_not_answer_is_dead_and_one_that_is_idle_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((embedded, "SILENT_S"), (watch, "PING_S"), (wire, "TIMEOUT_S")):
        monkeypatch.setattr(module, name, 0.3)
    with EmbeddedServer(tmp_path) as server:
        time.sleep(1.0)
        assert server.alive
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)
        deadline = time.monotonic() + 10.0
        while server.alive:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        began = time.monotonic()
        server.stop()
        assert not psutil.pid_exists(pid) and time.monotonic() - began < embedded.STOP_S / 2
        connect(server.start().url).ping()
