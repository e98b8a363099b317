"""`up` that cannot work says why in one line, before it starts anything."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from polygraft.cluster.settings import ServeSettings, Settings, load
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.launch import start as module
from polygraft.launch.children import supervise
from polygraft.launch.head import _loaded, reason_of
from polygraft.launch.output import Failure
from polygraft.launch.ports import PortTaken, claimed
from polygraft.launch.processes import Identity
from polygraft.launch.ram import available
from polygraft.launch.run_folder import RunFolder
from polygraft.launch.start import StartFailed, start
from tests.launch.test_supervision import stand_in, wait_for
from tests.small_disk import small_disk
from tests.tiny import tiny_llama

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def _starts_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("it began to start the service")

    monkeypatch.setattr(module, "_start", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def listening() -> Iterator[int]:
    """A port that shares itself, as Ray Serve's does."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((HOST, 0))
        listener.listen()
        yield listener.getsockname()[1]


def refused(settings: Settings) -> str:
    with pytest.raises(StartFailed) as caught:
        start(settings)
    assert isinstance(caught.value, Failure) and "\n" not in str(caught.value)
    return str(caught.value)


def test_of_two_services_on_one_port_the_second_says_which_home_holds_it(tmp_path: Path, tiny: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with claimed(HOST, 0, first) as (port, claim):
        holder = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[claim.fileno()])
    assert holder.stdin is not None  # it stands for the supervisor of the first, which has not got to listening yet
    try:
        reason = refused(load(home=second, port=port, backbone=str(tiny)))
        assert f"{HOST}:{port} is held by the service under {first}" in reason and "--port" in reason
        with claimed("127.0.0.2", port, second):
            pass
    finally:
        holder.stdin.close()
        holder.wait()
    with claimed(HOST, port, second) as (again, _):
        assert again == port


def test_a_port_that_a_program_listens_on_is_not_shared_with_it(tmp_path: Path, tiny: Path, listening: int) -> None:
    for host in (HOST, "0.0.0.0"):
        reason = refused(load(home=tmp_path, host=host, port=listening, backbone=str(tiny)))
        assert f"{host}:{listening} is in use by {psutil.Process().name()}, pid {psutil.Process().pid}" in reason


def test_an_address_that_is_not_this_machine_s_is_named(tmp_path: Path, tiny: Path) -> None:
    for port in (0, 8000):
        reason = refused(load(home=tmp_path, host="192.0.2.1", port=port, backbone=str(tiny)))
        assert "192.0.2.1" in reason and "address of this machine" in reason


def test_a_free_port_is_none_that_the_system_gives_to_connections(tmp_path: Path) -> None:
    """So that nothing takes it before the head listens there."""
    given, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    with claimed(HOST, 0, tmp_path) as (port, _):
        assert 20_000 <= port < given


def test_a_port_can_be_claimed_again_once_its_holder_is_gone(tmp_path: Path) -> None:
    with claimed(HOST, 0, tmp_path) as (port, _), pytest.raises(PortTaken), claimed(HOST, port, tmp_path):
        pass
    with claimed(HOST, port, tmp_path):
        pass


def broken(folder: Path, **config: object) -> Path:
    made = tiny_llama(folder)
    file = made / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return made


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda at: at.mkdir() or at, ("holds no config.json",)),
        (lambda at: broken(at, model_type="mamba"), ("model_type", "'mamba'", "supported: bert")),
        (lambda at: broken(at, quantization_config={"quant_method": "gptq"}), ("is quantised", "'gptq'", "nf4")),
    ],
    ids=["no config", "a model type", "a quantisation"],
)
def test_a_folder_that_cannot_be_the_backbone_is_refused_by_what_is_wrong_with_it(
    tmp_path: Path, make: Callable[[Path], Path], words: tuple[str, ...]
) -> None:
    folder = make(tmp_path / "backbone")
    reason = refused(load(home=tmp_path / "home", port=0, backbone=str(folder)))
    assert str(folder) in reason and all(word in reason for word in words)


def test_a_name_that_is_no_backbone_is_refused(tmp_path: Path) -> None:
    assert "'no such/folder/here'" in refused(load(home=tmp_path, port=0, backbone="no such/folder/here"))


def test_more_devices_than_the_machine_has_are_refused(tmp_path: Path, tiny: Path) -> None:
    reason = refused(load(home=tmp_path, port=0, backbone=str(tiny), device="cpu", devices=5000))
    assert reason.startswith("devices: 5000 are asked for, and this machine has ") and "at most" in reason


def test_a_full_disk_and_too_little_memory_are_said_with_their_numbers(tmp_path: Path, tiny: Path) -> None:
    with small_disk(tmp_path / "disk", mib=9) as disk:
        disk.fill(leaving=1 << 20)
        reason = refused(load(home=disk.folder / "home", data=tmp_path, port=0, backbone=str(tiny)))
        assert reason.startswith("disk: ") and "MiB are free" in reason and str(disk.folder) in reason
        disk.fill()
        assert "0.0 MiB are free" in refused(load(home=disk.folder / "home", port=0, backbone=str(tiny)))
    serve = ServeSettings(kv_bytes=1 << 50)
    reason = refused(load(home=tmp_path / "home", port=0, backbone=str(tiny), device="cpu", serve=serve))
    assert reason.startswith("memory: ") and "1048577.0 GiB" in reason and "serve.kv_bytes" in reason


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refused(load(home=tmp_path / "file" / "home")).startswith(f"home: {tmp_path}/file")


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 600000\ninactive_file 200000\nactive_file 100000\n")
    assert available(tmp_path) == 400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available(tmp_path) > 1_000_000


def test_the_last_line_of_another_process_s_traceback_is_the_reason() -> None:
    quoted = RuntimeError(
        "Deploying application polygraft failed: Traceback (most recent call last):\n"
        '  File "serve.py", line 1, in deploy\n'
        "polygraft.grafts.runtime.pretrained.BackboneError: backbone: /models/x holds no config.json\n"
    )
    assert reason_of(quoted) == "BackboneError: backbone: /models/x holds no config.json"
    assert reason_of(ValueError("port: 1 is taken\nmore")) == "ValueError: port: 1 is taken"


def test_a_service_that_ended_by_itself_says_its_reason_first(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.path.mkdir()
    folder.enter("starting Ray")
    assert module._why(folder).startswith("the service did not start: starting Ray\n")
    folder.fail("store: the disk\nis gone")
    assert module._why(folder) == f"the service did not start: store: the disk is gone (more in {folder.path})"
    folder.note("one")
    folder.note("two")
    assert folder.notes == ("one", "two")
    folder.clear()
    assert folder.notes == () and folder.reason == ""  # type: ignore[comparison-overlap]


def test_what_is_said_of_a_service_is_left_out_on_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", mib=1) as disk:
        folder = RunFolder(disk.folder)
        folder.enter("before")
        disk.fill()
        folder.enter("after")
        folder.fail("no room")
        assert folder.stage == "before" and folder.reason == ""


def test_a_supervisor_goes_on_on_a_full_disk_and_records_its_children_once_there_is_room(tmp_path: Path) -> None:
    stop, recorded = threading.Event(), []
    with small_disk(tmp_path / "disk", mib=1) as disk:
        disk.fill()

        def record(children: object) -> None:
            (disk.folder / "record").write_bytes(b"x" * 4096)
            recorded.append(children)

        child = stand_in(tmp_path, "child")
        thread = threading.Thread(target=supervise, args=([child], stop), kwargs={"on_change": record})
        thread.start()
        try:
            wait_for((tmp_path / "child").exists)
            assert thread.is_alive() and not recorded
            disk.make_room()
            wait_for(lambda: bool(recorded))
        finally:
            stop.set()
            thread.join()


def test_a_store_that_keeps_dying_for_want_of_room_is_not_given_up(tmp_path: Path) -> None:
    from polygraft.launch.supervisor import EmbeddedStore

    with small_disk(tmp_path / "disk", mib=14) as disk, EmbeddedServer(disk.folder / "store") as server:
        store = EmbeddedStore(server)
        assert not store.excused
        disk.fill()
        assert store.excused


@pytest.mark.parametrize("then", ["DELETING", None])
def test_a_backbone_that_is_unloaded_while_it_loads_fails_no_start(
    then: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where loading takes longer than nobody asks for it."""
    from ray.serve.schema import ApplicationStatus

    statuses = iter([None, "NOT_STARTED", "DEPLOYING", then])

    def status() -> SimpleNamespace:
        one = next(statuses)
        found = {"b": SimpleNamespace(status=ApplicationStatus(one), message="", deployments={})} if one else {}
        return SimpleNamespace(applications=found)

    monkeypatch.setattr("ray.serve.status", status)
    assert _loaded("b", threading.Event(), Identity.of(os.getpid()))
    assert next(statuses, "no more") == "no more"
