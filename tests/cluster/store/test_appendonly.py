"""The append-only file after a power cut: what was acknowledged is there, what was not is cut off and told of."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import redis

from polygraft.cluster.store import appendonly
from polygraft.cluster.store.base import StoreError
from polygraft.cluster.store.embedded import EmbeddedServer

VALUES = {f"job-{number}": f"line\r\n{number} " * 3 for number in range(4)}
INCREMENT = "return {redis.call('SET', KEYS[1], ARGV[1]), redis.call('SET', KEYS[2], ARGV[1])}"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a server that took VALUES and then one transaction, `a` and `b`, and was stopped."""
    folder = tmp_path_factory.mktemp("store")
    with EmbeddedServer(folder) as server, redis.Redis.from_url(server.url) as client:
        for name, value in VALUES.items():
            client.set(name, value)
        client.eval(INCREMENT, 2, "a", "b", "together")
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "store"))


def file_of(folder: Path) -> Path:
    (file,) = (folder / "appendonlydir").glob("*.incr.aof")
    return file


def served(server: EmbeddedServer) -> dict[str, str]:
    with server, redis.Redis.from_url(server.url, decode_responses=True) as client:
        return {name: str(client.get(name)) for name in sorted(map(str, client.keys()))}


BOTH = {"a": "together", "b": "together"}


def test_a_whole_file_has_no_tail(folder: Path) -> None:
    assert appendonly.tail(folder) is None
    assert served(server := EmbeddedServer(folder)) == VALUES | BOTH
    assert server.cut is None


@pytest.mark.parametrize("zeros", [1, 4096, 10_000])
def test_zeros_at_the_end_are_cut_off_and_told_of(folder: Path, zeros: int) -> None:
    size = file_of(folder).stat().st_size
    with file_of(folder).open("ab") as file:
        file.write(bytes(zeros))
    server = EmbeddedServer(folder)
    assert served(server) == VALUES | BOTH
    assert server.cut is not None and (server.cut.whole, server.cut.size, server.cut.torn) == (size, size + zeros, True)
    assert str(file_of(folder)) in str(server.cut) and str(zeros) in str(server.cut)
    assert server.cut.kept.read_bytes() == b""
    assert served(EmbeddedServer(folder)) == VALUES | BOTH


@pytest.mark.parametrize("zeros", [0, 4096])
def test_wherever_the_last_transaction_is_torn_all_before_it_is_kept(folder: Path, zeros: int) -> None:
    """Every byte by the scan; a server is asked at three places."""
    whole = file_of(folder).read_bytes()
    begin = whole.rindex(b"*1\r\n$5\r\nMULTI")
    for end in range(begin + 1, len(whole)):
        file_of(folder).write_bytes(whole[:end] + bytes(zeros))
        found = appendonly.tail(folder)
        assert found is not None and (found.whole, found.torn) == (begin, True), end
    for end in (begin + 1, begin + 40, len(whole) - 1):
        file_of(folder).write_bytes(whole[:end] + bytes(zeros))
        assert served(EmbeddedServer(folder)) == VALUES
        (tail,) = (folder / "appendonlydir").glob("*.cut-at-*")
        assert tail.read_bytes() == whole[begin:end]


@pytest.mark.parametrize("damage", [b"\0" * 16, b"garbage", b"$999999\r\n"])
def test_a_file_that_is_damaged_before_acknowledged_commands_is_left_alone_until_someone_says_so(
    folder: Path, damage: bytes
) -> None:
    whole = file_of(folder).read_bytes()
    at = whole.index(b"$5\r\njob-2")
    begin = whole.rindex(b"*3", 0, at)
    damaged = whole[:at] + damage + whole[at + len(damage) :]
    file_of(folder).write_bytes(damaged)
    with pytest.raises(StoreError, match=f"after byte {begin} of .*up --cut-store"):
        EmbeddedServer(folder).start()
    assert file_of(folder).read_bytes() == damaged
    found = appendonly.cut_damaged(folder)
    assert found is not None and found.kept.read_bytes() == damaged[begin:]
    assert served(EmbeddedServer(folder)) == {name: VALUES[name] for name in ("job-0", "job-1")}


def test_nothing_is_cut_under_a_running_server(folder: Path) -> None:
    with EmbeddedServer(folder):
        with file_of(folder).open("ab") as file:
            file.write(bytes(4096))
        with pytest.raises(StoreError, match="stop it first"):
            appendonly.cut_damaged(folder)
        with pytest.raises(StoreError, match="another server"):
            EmbeddedServer(folder).start()
        assert appendonly.tail(folder) is not None
    assert served(EmbeddedServer(folder)) == VALUES | BOTH
