"""The service as a person uses it from the shell, on a tiny backbone: the tutorial's commands as they are written, what
listens then, what is there after `down` and the next `up`, and after a head that was killed."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import chdir, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import redis
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from polygraft.cluster import searches as remote
from polygraft.cluster.client import Client
from polygraft.cluster.service import find_service
from polygraft.launch.commands.search_file import read_search_file
from polygraft.launch.main import app
from polygraft.launch.processes import session
from polygraft.launch.run_folder import RunFolder
from polygraft.tuning.desk import read
from polygraft.tuning.study import Result, Trial
from tests.e2e import searched
from tests.e2e.read_by_peft import Read
from tests.tiny import tiny_llama

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
_BLOCK = re.compile(r"^```(console|python|yaml)\n(.+?)^```$", re.MULTILINE | re.DOTALL)
_SAVED = re.compile(r"Save this as\s+`([\w.]+)`")
_NUMBER = re.compile(r"\b(?=\w*\d)[\w.,:]*\w")  # an id or a time, too
CHAT = 'polygraft chat tickets -m "My screen is black." --max-tokens 40 --temperature 0'
SETTINGS = {
    "POLYGRAFT_PORT": "0",
    "POLYGRAFT_DTYPE": "fp32",
    # A micro-batch a step: the tiny tokenizer makes many tokens of an example.
    "POLYGRAFT_PACK__MICRO_ROWS": "600",
    "POLYGRAFT_PACK__MAX_ROWS": "1200",
}
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

pytestmark = [pytest.mark.timeout(600)]


@dataclass(frozen=True, slots=True)
class Shell:
    """Runs `polygraft` on one home folder, from the folder that holds it."""

    home: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, *arguments: str, expect: int = 0) -> str:
        status, said, errors = self.run(*arguments)
        assert status == expect, f"{arguments}: exit status {status}\n{said}\n{errors}"
        return errors if expect else said

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, output and errors. What starts or ends processes has one of its own; what only talks to the
        service runs in this one, which has imported what takes seconds to import."""
        given, environment = ("--home", str(self.home), *arguments), {**os.environ, **self.environment}
        with chdir(self.home.parent):
            if arguments[0] in ("up", "down"):
                command = (sys.executable, "-m", "polygraft.launch", *given)
                ended = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment)
                return ended.returncode, ended.stdout, ended.stderr
            done = CliRunner(env=environment).invoke(app, given)
            return done.exit_code, done.stdout, f"{done.stderr}\n{done.exception!r}"

    def line(self, line: str) -> str:
        """What a line of the tutorial says: `polygraft` and its arguments, or `python` and a script beside the home."""
        program, *arguments = shlex.split(line)
        if program == "polygraft":
            return self(*arguments)
        assert program == "python"
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said, chdir(self.home.parent):
            patch.setenv("HOME", str(self.home.parent))
            runpy.run_path(*arguments)  # type: ignore[arg-type]
        return said.getvalue()

    @property
    def sessions(self) -> list[int]:
        """The supervisor and its children, each the leader of a session."""
        last = RunFolder(self.home).supervision
        assert last is not None
        return [last.supervisor.pid, *(child.pid for child in last.children)]


@dataclass(frozen=True, slots=True)
class Told:
    """What the tutorial shows after each command, empty where it shows nothing, and what the command said."""

    shown: Mapping[str, str]
    said: Mapping[str, str]


@pytest.fixture(scope="module")
def polygraft(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """The tiny backbone lies where the service keeps smollm2, and what is compiled is not compiled again."""
    folder = tmp_path_factory.mktemp("person")
    cache = folder / "cache" / "polygraft"
    tiny_llama(cache / "backbones" / "smollm2")
    compiled = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "polygraft" / "kernels"
    compiled.mkdir(parents=True, exist_ok=True)
    (cache / "kernels").symlink_to(compiled)
    polygraft = Shell(folder / ".polygraft", {**SETTINGS, "XDG_CACHE_HOME": str(cache.parent)})
    yield polygraft
    polygraft("down")


@pytest.fixture(scope="module")
def told(polygraft: Shell) -> Told:
    """The tutorial from its first command to the last before `polygraft down`, but for the search."""
    text, folder = TUTORIAL.read_text(), polygraft.home.parent
    shown: dict[str, str] = {}
    said: dict[str, str] = {}
    for block in _BLOCK.finditer(text):
        kind, body = block.groups()
        saved = _SAVED.findall(text[: block.start()].rpartition("```")[2])
        if saved:
            (folder / saved[0]).write_text(body)
        elif kind == "python":
            service = find_service(polygraft.home / "run" / "service.json")
            (folder / "client.py").write_text(body.replace("http://127.0.0.1:8000", service.url))
            said["client"] = polygraft.line("python client.py")
        for command in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:] if kind == "console" else ():
            line, _, output = command.partition("\n")
            if line == "polygraft down":
                return Told(shown, said)
            if not line.startswith("polygraft search"):
                shown[line], said[line] = output, polygraft.line(line)
    raise AssertionError("the tutorial leaves the service up")


def test_the_tutorials_commands_say_what_it_shows(told: Told, polygraft: Shell) -> None:
    """Line by line, but for what the model answers, and for numbers, ids and times."""
    assert len(told.said) > 10
    for line, shown in told.shown.items():
        if not line.startswith("polygraft chat"):
            said = [_NUMBER.sub("#", one).rstrip() for one in told.said[line].splitlines()]
            assert [one for one in shown.splitlines() if _NUMBER.sub("#", one) not in said] == [], told.said[line]
    models = ["smollm2", "tickets", "tickets-ia3", "tickets-union"]
    assert re.findall(rf"^({'|'.join(reversed(models))}) ", told.said["client"], re.MULTILINE) == models
    steps = [json.loads(line) for log in polygraft.home.glob("data/packs/*/steps.jsonl") for line in log.open()]
    assert steps and all({"rows", "jobs", "methods"} <= step.keys() for step in steps)
    assert read_search_file(polygraft.home.parent / "search.yaml").trials == 6


def test_every_socket_is_this_machine_s_and_asks_who_calls(told: Told, polygraft: Shell) -> None:
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
    assert {kind for _, kind, _ in found.values()} == {"gRPC", "HTTP", "channel", "store"}


def test_nobody_else_reads_what_ray_writes(told: Told, polygraft: Shell) -> None:
    last = RunFolder(polygraft.home).supervision
    assert last is not None
    assert Path(last.scratch).stat().st_mode & 0o077 == 0, "Ray opens its own folder to everybody"


def test_a_second_home_is_refused_the_port(told: Told, polygraft: Shell) -> None:
    second = Shell(polygraft.home.parent / "second", polygraft.environment)
    port = find_service(polygraft.home / "run" / "service.json").url.rpartition(":")[2]
    said = second("up", "--port", port, expect=1)
    assert f"held by the service under {polygraft.home}" in said and RunFolder(second.home).supervision is None


def test_a_classifier_and_what_searches_found_are_what_peft_reads_of_them(told: Told, polygraft: Shell) -> None:
    """Asked for by another tenant, side by side: a job that classifies, a search of choice sets by their accuracy, and
    population based training."""
    folder, key = polygraft.home.parent, json.loads(polygraft("keys", "create", "ann", "--json"))["key"]
    ann = Shell(polygraft.home, {**polygraft.environment, "POLYGRAFT_API_KEY": key})
    searched.write(folder)
    begun = [
        json.loads(ann("search", f"{name}.yaml", "--detach", "--json"))["id"] for name in ("choices", "population")
    ]
    words = "submit texts.tsv --validation-file texts.tsv --type classification --epochs 4 --lr 0.05 --suffix kinds"
    job = json.loads(ann(*words.split(), "--peft", "lora(r=2, at=attn.[qv])", "--json"))

    service = find_service(polygraft.home / "run" / "service.json")
    with Client(service.url, key) as client:

        def exported(model: str, labels: int = 0) -> Read:
            archive = folder / f"{model}.tar"
            client.export_graft(model, archive)
            with tarfile.open(archive) as files:
                files.extractall(folder / model, filter="data")
            (found,) = (folder / model).rglob("adapter_config.json")
            return Read.of(backbone, found.parent, labels=labels)

        backbone = Path(polygraft.environment["XDG_CACHE_HOME"]) / "polygraft" / "backbones" / "smollm2"
        peft, labels = exported(job["fine_tuned_model"], len(searched.LABELS)), searched.LABELS
        texts = [text for text, _ in searched.TEXTS]
        found, right = torch.stack([peft.logits(text) for text in texts]), [label for _, label in searched.TEXTS]
        numbers = torch.tensor([labels.index(label) for label in right])
        assert job["loss_after"] == pytest.approx(float(F.cross_entropy(found, numbers)), rel=1e-4)
        assert job["loss_after"] < job["loss_before"]
        assert job["scores_after"]["accuracy"] == pytest.approx(float((found.argmax(-1) == numbers).float().mean()))
        asked = {"model": "kinds", "input": texts}
        answer = httpx.post(f"{service.url}/classify", json=asked, headers={"Authorization": f"Bearer {key}"})
        told_labels = answer.json()["data"]
        assert torch.tensor([one["probs"] for one in told_labels]).sub(found.softmax(-1)).abs().max() < 1e-4
        assert [one["label"] for one in told_labels] == [labels[index] for index in found.argmax(-1)]

        choices, population = (_over(client, search) for search in begun)
        for trial in choices:
            assert isinstance(trial.outcome, Result) and trial.values is not None
            peft = exported(str(trial.outcome.model))
            assert 1 - trial.values[0] == pytest.approx(peft.accuracy(searched.QUESTIONS))
            right_answers = [(prompt, every[answer]) for prompt, every, answer in searched.QUESTIONS]
            assert trial.loss == pytest.approx(peft.loss(right_answers), rel=1e-4)
        for trial in population:
            assert isinstance(trial.outcome, Result)
            assert trial.loss == pytest.approx(exported(str(trial.outcome.model)).loss(searched.PAIRS), rel=1e-4)
        first, second = population[:2], population[2:]
        assert [trial.until for trial in (*first, *second)] == [0.5, 0.5, 1.0, 1.0]
        best = min(first, key=lambda trial: (trial.values or (), trial.number)).number
        assert [trial.parent for trial in second] == [best, best]
        assert sum(trial.config == first[best].config for trial in second) == 1, "one goes on as it was, one explores"


def test_nothing_runs_after_down_and_all_is_there_after_the_next_up(told: Told, polygraft: Shell) -> None:
    assert "already running" in polygraft("up")
    leaders = polygraft.sessions
    polygraft("down")
    assert [list(session(leader)) for leader in leaders] == [[]] * len(leaders)
    polygraft("jobs", expect=3)

    polygraft("up")
    jobs = {job["fine_tuned_model"]: job for job in json.loads(polygraft("jobs", "--json"))}
    assert jobs.keys() == {"tickets@1", "tickets-ia3@1", "tickets-union@1"}
    assert {job["status"] for job in jobs.values()} == {"succeeded"}
    assert jobs["tickets@1"]["loss_after"] < jobs["tickets@1"]["loss_before"]
    assert jobs["tickets@1"]["id"] in told.said["polygraft story tickets@1"]
    assert "tickets@1" in polygraft("grafts", "list")
    assert polygraft.line(CHAT) == told.said[CHAT]

    _kill_the_head(polygraft)
    assert polygraft.line(CHAT) == told.said[CHAT]


@pytest.mark.nightly
def test_the_tutorials_search_publishes_its_trials_and_draws_the_front(told: Told, polygraft: Shell) -> None:
    (line,) = re.findall(r"^\$ (polygraft search .+)$", TUTORIAL.read_text(), re.MULTILINE)
    polygraft.line(line)
    assert (polygraft.home.parent / "front.png").stat().st_size > 0
    assert "tickets-search-3" in polygraft("grafts", "list")


def _over(client: Client, search: str) -> list[Trial]:
    """The trials of a search once it has succeeded."""
    while not (found := remote.show(client, search)).final:
        time.sleep(0.2)
    assert found.status == "succeeded", found.note
    return [read(one.model_dump(exclude={"id", "object"})) for one in remote.trials(client, search)]


def _without_a_token(port: int) -> tuple[str, str]:
    """What listens there, and what it does with a command of someone who has neither token nor key nor password."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        codes = {_code(channel, method) for method in METHODS} - {grpc.StatusCode.UNIMPLEMENTED}
    if grpc.StatusCode.UNAVAILABLE not in codes:
        return "gRPC", "refused" if codes == {grpc.StatusCode.UNAUTHENTICATED} else str(codes)
    try:
        answers = {method: httpx.request(method, f"http://127.0.0.1:{port}/metrics") for method in ("GET", "POST")}
    except httpx.RemoteProtocolError:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as guessing:
            guessing.sendall(b"secret ingress\n")
            if guessing.recv(1) == b"":
                return "channel", "refused"
        with redis.Redis(port=port) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
        return "store", "refused"
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
    head, service = polygraft.sessions[-1], find_service(polygraft.home / "run" / "service.json")
    os.kill(head, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline, "the head did not come back"
        time.sleep(0.2)
        with suppress(httpx.TransportError):  # refused, or cut off
            assert httpx.get(f"{service.url}/v1/models", timeout=30).status_code in (401, 503)
        if list(session(head)):  # its proxy may answer yet
            continue
        if polygraft.run("jobs")[0] == 0:
            return
