"""The store's pod on a volume that fills up: its own configuration and its own watch, over a real server and disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from polygraft.cluster.store.embedded import find_server, free_port
from tests.k8s.pod import BASE
from tests.small_disk import SmallDisk, small_disk

OBJECTS = {
    (one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all((BASE / "valkey.yaml").read_text())
}
FILES = OBJECTS["ConfigMap", "polygraft-valkey"]["data"]
POD = OBJECTS["StatefulSet", "polygraft-valkey"]["spec"]["template"]["spec"]
SERVER, ROOM = POD["containers"]
PASSWORD = "s3cret"
# What valkey-cli does with a command, which the package of the server does not bring.
CLI = f"""#!{sys.executable}
import os, sys, redis
store = redis.Redis(port=int(os.environ["PORT"]), password=os.environ["REDISCLI_AUTH"], decode_responses=True)
answer = store.execute_command(*sys.argv[1:])
print(*([word for pair in answer.items() for word in pair] if isinstance(answer, dict) else [answer]), sep="\\n")
"""
# What df says of a folder, which it does not of one in another mount namespace.
DF = f"""#!{sys.executable}
import os, sys
found = os.statvfs(sys.argv[-1])
print("Filesystem 1024-blocks Used Available Capacity Mounted on")
print("none", 0, 0, found.f_bavail * found.f_frsize // 1024, "0%", sys.argv[-1])
"""


@contextmanager
def started(command: list[str], environment: dict[str, str], text: str = "") -> Iterator[None]:
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stdin is not None
    try:
        with process.stdin as given:
            given.write(text.encode())
        yield
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", mib=14) as disk:
        yield disk


@pytest.fixture
def store(disk: SmallDisk) -> Iterator[redis.Redis]:
    """The server as the pod's command starts it, the password on its standard input."""
    port = free_port()
    config = FILES["valkey.conf"].replace("dir /data", f"dir {disk.folder}\nport {port}\nbind 127.0.0.1")
    assert "<<END" in SERVER["command"][2] and "requirepass $VALKEY_PASSWORD" in SERVER["command"][2]
    with started([find_server(), "-"], dict(os.environ), f"{config}\nrequirepass {PASSWORD}\n"):
        client = redis.Redis(port=port, password=PASSWORD, decode_responses=True)
        until(lambda: reads(client))
        yield client
        client.close()


@contextmanager
def watched(disk: SmallDisk, store: redis.Redis, tools: Path) -> Iterator[None]:
    """The container `room`, with bounds that this disk has."""
    given = {one["name"]: one.get("value", PASSWORD) for one in ROOM["env"]}
    assert ROOM["command"] == ["sh", "/etc/valkey/room.sh"] and given["DATA"] == "/data"
    assert 0 < int(given["LITTLE_KIB"]) < int(given["ENOUGH_KIB"])
    for name, text in {"valkey-cli": CLI, "df": DF}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tools / "room.sh").write_text(FILES["room.sh"])
    port = str(store.get_connection_kwargs()["port"])
    small = {"DATA": str(disk.folder), "LITTLE_KIB": "4096", "ENOUGH_KIB": "6144", "LOOK_S": "0.1", "PORT": port}
    path = f"{tools}:{os.environ['PATH']}"
    with started(["sh", str(tools / "room.sh")], {**os.environ, **given, **small, "PATH": path}):
        yield


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def reads(store: redis.Redis) -> bool:
    try:
        return store.get("nothing") is None
    except redis.ConnectionError:
        return False


def writes(store: redis.Redis) -> bool:
    try:
        return bool(store.set("key", "kept"))
    except redis.ResponseError:
        return False


def test_the_store_refuses_to_write_while_its_volume_is_nearly_full_and_reads_on(
    disk: SmallDisk, store: redis.Redis, tmp_path: Path
) -> None:
    assert not writes(store), "not before somebody has looked whether there is room"
    with watched(disk, store, tmp_path):
        until(lambda: writes(store))
        assert store.config_get("appendfsync") == {"appendfsync": "always"}
        disk.fill(leaving=2 << 20)
        until(lambda: not writes(store))
        disk.fill()
        assert store.get("key") == "kept" and not writes(store)
        disk.make_room()
        until(lambda: writes(store))


def test_the_watch_sees_the_servers_volume_and_can_change_nothing_there() -> None:
    mounts: dict[str, Any] = {one["name"]: one for one in ROOM["volumeMounts"]}
    assert mounts["data"] == {"name": "data", "mountPath": "/data", "readOnly": True}
    assert ROOM["image"] == SERVER["image"] and ROOM["securityContext"] == SERVER["securityContext"]
