"""The service as a person uses it from the shell, on a tiny backbone: up, submit, chat, down, and up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import redis

from polygraft.cluster.service import find_service
from polygraft.launch.processes import session
from polygraft.launch.run_folder import RunFolder
from tests.tiny import tiny_llama

TRAINING = "".join(
    json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}) + "\n"
    for question, answer in 8 * [("What is a graft?", "A shoot on a stock."), ("When do you do it?", "In late winter.")]
)


# One of each service that Ray's processes offer, such that an empty call changes nothing.
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.LogService/ListLogs",
    "/ray.serve.ASGIService/HandleRequest",
)
LOOPBACK = ("127.0.0.1", "::ffff:127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Shell:
    """Runs `polygraft` in processes of its own, on one home folder."""

    home: Path

    def __call__(self, *arguments: str, expect: int = 0) -> str:
        command = (sys.executable, "-m", "polygraft.launch", "--home", str(self.home), *arguments)
        done = subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=self.home.parent)
        assert done.returncode == expect, f"{arguments}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stderr if expect else done.stdout

    @property
    def sessions(self) -> list[int]:
        """The supervisor and its children, each the leader of a session."""
        last = RunFolder(self.home).supervision
        assert last is not None
        return [last.supervisor.pid, *(child.pid for child in last.children)]


@pytest.fixture
def polygraft(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path / "home")
    yield shell
    shell("down")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_up_submit_chat_down_and_all_is_there_after_the_next_up(tmp_path: Path, polygraft: Shell) -> None:
    tiny = tiny_llama(tmp_path / "tiny")
    (tmp_path / "train.jsonl").write_text(TRAINING)
    polygraft("up", "--port", "0", "--backbone", str(tiny), "--dtype", "fp32")
    assert "already running" in polygraft("up", "--port", "0")
    _a_second_home_is_refused_the_port(tmp_path, polygraft, tiny)
    file = str(tmp_path / "train.jsonl")
    options = ("--peft", "lora(r=4)", "--epochs", "4", "--lr", "5e-3", "--suffix", "mine")
    job = json.loads(polygraft("submit", file, "--validation-file", file, *options, "--json"))
    assert job["status"] == "succeeded" and job["loss_after"] < job["loss_before"]
    answer = polygraft("chat", "mine", "-m", "What is a graft?", "--max-tokens", "8", "--temperature", "0")
    assert "published" in polygraft("story", "mine@1")
    _every_socket_is_this_machine_s_and_asks_who_calls(polygraft)

    leaders = polygraft.sessions
    polygraft("down")
    assert [list(session(leader)) for leader in leaders] == [[]] * len(leaders)
    polygraft("jobs", expect=3)

    polygraft("up", "--port", "0", "--backbone", str(tiny), "--dtype", "fp32")
    assert [one["id"] for one in json.loads(polygraft("jobs", "--json"))] == [job["id"]]
    assert "mine@1" in polygraft("grafts", "list")
    assert polygraft("chat", "mine@1", "-m", "What is a graft?", "--max-tokens", "8", "--temperature", "0") == answer

    _kill_the_head(polygraft)
    assert polygraft("chat", "mine@1", "-m", "What is a graft?", "--max-tokens", "8", "--temperature", "0") == answer


def _a_second_home_is_refused_the_port(tmp_path: Path, polygraft: Shell, tiny: Path) -> None:
    second = Shell(tmp_path / "second")
    port = find_service(polygraft.home / "run" / "service.json").url.rpartition(":")[2]
    said = second("up", "--port", port, "--backbone", str(tiny), expect=1)
    assert f"held by the service under {polygraft.home}" in said and RunFolder(second.home).supervision is None


def _every_socket_is_this_machine_s_and_asks_who_calls(polygraft: Shell) -> None:
    """With an engine and a pack at work. Whoever reaches one of Ray's ports and holds no token commands nothing. Serve
    cannot be told where a replica's own port shall listen."""
    sockets = {
        (one.laddr.ip, one.laddr.port): psutil.Process(pid).name()
        for leader in polygraft.sessions
        for pid in session(leader)
        for one in psutil.Process(pid).net_connections("inet")
        if one.status == psutil.CONN_LISTEN
    }
    beyond = [name for (ip, _), name in sockets.items() if ip not in LOOPBACK]
    assert len(beyond) == 2 and all(name.startswith("ray::ServeRepl") for name in beyond), sockets
    found = {port: (name, *_without_a_token(port)) for (_, port), name in sockets.items()}
    assert {answer for *_, answer in found.values()} == {"refused"}, found
    assert {kind for _, kind, _ in found.values()} == {"gRPC", "HTTP", "metrics", "store"}
    # Two of the three ports of metrics are the same for every Ray: one beside another on a machine goes without.
    assert sum(kind == "metrics" for _, kind, _ in found.values()) in (1, 2, 3), found


def _without_a_token(port: int) -> tuple[str, str]:
    """What listens there, and what it does with a command of someone who has neither token nor key nor password."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        codes = {_code(channel, method) for method in METHODS} - {grpc.StatusCode.UNIMPLEMENTED}
    if grpc.StatusCode.UNAVAILABLE not in codes:
        return "gRPC", "refused" if codes == {grpc.StatusCode.UNAUTHENTICATED} else str(codes)
    try:
        answers = {method: httpx.request(method, f"http://127.0.0.1:{port}/metrics") for method in ("GET", "POST")}
    except httpx.RemoteProtocolError:
        with redis.Redis(port=port) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
        return "store", "refused"
    if answers["GET"].is_success:  # numbers, to read for anybody on this machine
        return "metrics", "refused" if answers["POST"].status_code == 405 else answers["POST"].text
    return "HTTP", "refused" if {one.status_code for one in answers.values()} == {401} else str(answers)


def _code(channel: grpc.Channel, method: str) -> grpc.StatusCode:
    try:
        channel.unary_unary(method)(b"", timeout=5)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def _kill_the_head(polygraft: Shell) -> None:
    """SIGKILL the head; return when the supervisor has started another one that answers."""
    head = polygraft.sessions[-1]
    os.kill(head, signal.SIGKILL)
    service = find_service(polygraft.home / "run" / "service.json")
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline, "the head did not come back"
        time.sleep(0.5)
        with suppress(httpx.TransportError):  # refused, or cut off
            assert httpx.get(f"{service.url}/v1/models", timeout=30).status_code in (401, 503)
        if psutil.pid_exists(head) and list(session(head)):
            continue
        doctor = subprocess.run(
            (sys.executable, "-m", "polygraft.launch", "--home", str(polygraft.home), "jobs"),
            capture_output=True,
        )
        if doctor.returncode == 0:
            return
