"""The command line against a service of canned answers, and without one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from polygraft.cluster.client import Client
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.s4 import s4
from polygraft.grafts.sites import ModelShape
from polygraft.launch.commands.common import Flags
from polygraft.launch.main import app

JOB = {
    "id": "ftjob-1",
    "status": "succeeded",
    "model": "smollm2",
    "fine_tuned_model": "mine@1",
    "created_at": 1,
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"peft": "lora(r=8)"}}},
    "parameters": 460800,
    "step": 9,
    "steps_total": 9,
    "loss_before": 3.5,
    "loss_after": 2.25,
}
MODELS = {
    "data": [
        {"id": "smollm2", "created": 0, "owned_by": "polygraft", "root": "smollm2"},
        {"id": "mine@1", "created": 1, "owned_by": "local", "root": "mine@1", "parent": "smollm2"},
    ],
    "has_more": False,
}
SMOLLM2_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}
Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    """Makes every command's client talk to a function."""

    def serve(answer: Answer) -> None:
        transport = httpx.MockTransport(answer)
        monkeypatch.setattr(Flags, "client", lambda _: Client("http://service", "pg-key", transport=transport))

    return serve


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_help_needs_neither_torch_nor_ray() -> None:
    blocked = "import sys; sys.modules |= {'torch': None, 'ray': None}"
    code = f"{blocked}; from polygraft.launch.main import app; app(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "submit" in done.stdout


@pytest.mark.parametrize("command", [["jobs"], ["keys", "list"], ["story", "ftjob-1"], ["chat", "-m", "Hi"]])
def test_a_command_without_a_service_says_how_to_start_one(command: list[str], tmp_path: Path) -> None:
    done = run("--home", str(tmp_path), *command)
    assert done.exit_code == 3
    assert "polygraft up" in done.stderr and not done.stdout


def test_jobs_as_a_table_and_as_json(served: Callable[[Answer], None]) -> None:
    served(lambda _: httpx.Response(200, json={"data": [JOB], "has_more": False}))
    table = run("jobs")
    assert table.exit_code == 0
    assert "lora(r=8)" in table.stdout and "mine@1" in table.stdout
    assert json.loads(run("jobs", "--json").stdout)[0]["loss_after"] == 2.25


def test_jobs_of_several_backbones_are_told_apart(served: Callable[[Answer], None]) -> None:
    served(lambda _: httpx.Response(200, json={"data": [JOB, {**JOB, "model": "qwen"}], "has_more": False}))
    table = run("jobs").stdout
    assert "backbone" in table and "smollm2" in table and "qwen" in table


def test_backbones_are_added_listed_and_removed_as_asked(served: Callable[[Answer], None], tmp_path: Path) -> None:
    added = {"object": "backbone", "default": False, "path": str(tmp_path), "dtype": "bf16", "quantise": "nf4"}
    added |= {"id": "qwen", "fingerprint": "f" * 64, "context_length": 4096, "state": "unloaded", "added_at": 1}
    sent: list[tuple[str, str, object]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        sent.append((request.method, request.url.path, body))
        return httpx.Response(200, json=added if request.method == "POST" else {"data": [added], "has_more": False})

    served(answer)
    done = run("backbones", "add", "qwen", str(tmp_path), "--dtype", "bf16", "--quantise", "nf4")
    assert done.exit_code == 0 and "--model qwen" in done.stdout
    table = run("backbones", "list").stdout
    assert "unloaded" in table and "4096" in table and "ffffffffffff" in table
    assert json.loads(run("backbones", "list", "--json").stdout)[0]["fingerprint"] == "f" * 64
    assert run("backbones", "remove", "qwen").exit_code == 0
    assert sent[0] == (
        "POST",
        "/v1/backbones",
        {"name": "qwen", "path": str(tmp_path), "dtype": "bf16", "quantise": "nf4"},
    )
    assert sent[-1] == ("DELETE", "/v1/backbones/qwen", None)


def test_a_job_that_is_not_there_is_exit_status_4(served: Callable[[Answer], None]) -> None:
    served(
        lambda _: httpx.Response(404, json={"error": {"message": "job 'x' does not exist", "type": "not_found_error"}})
    )
    done = run("jobs", "x")
    assert done.exit_code == 4
    assert "job 'x' does not exist" in done.stderr


def test_submit_uploads_the_file_and_sends_what_was_asked(served: Callable[[Answer], None], tmp_path: Path) -> None:
    sent: dict[str, object] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/files":
            return httpx.Response(200, json={"id": "file-1", "filename": "a", "bytes": 2, "created_at": 1})
        if request.method == "POST":
            sent.update(json.loads(request.read()))
        return httpx.Response(200, json=MODELS if request.url.path == "/v1/models" else JOB)

    served(answer)
    (tmp_path / "train.jsonl").write_text("{}\n")
    done = run(
        "submit", str(tmp_path / "train.jsonl"), "--peft", "dora(r=4)", "--lr", "1e-3", "--suffix", "mine", "--json"
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["fine_tuned_model"] == "mine@1"
    hyperparameters = {"peft": "dora(r=4)", "learning_rate": 1e-3}
    assert sent == {
        "model": "smollm2",
        "training_file": "file-1",
        "suffix": "mine",
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    }


def test_a_yaml_file_has_the_same_names_and_options_win(served: Callable[[Answer], None], tmp_path: Path) -> None:
    sent: dict[str, object] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/fine_tuning/jobs":
            sent.update(json.loads(request.read()))
        return httpx.Response(200, json=JOB)

    served(answer)
    (tmp_path / "job.yaml").write_text("training_file: file-7\nmodel: smollm2\npeft: ia3\nn_epochs: 2\nbatch_size: 8\n")
    assert run("submit", str(tmp_path / "job.yaml"), "--epochs", "5", "--detach").exit_code == 0
    method = {"type": "supervised", "supervised": {"hyperparameters": {"peft": "ia3", "n_epochs": 5, "batch_size": 8}}}
    assert sent == {"model": "smollm2", "training_file": "file-7", "method": method}


def test_an_unknown_field_of_a_yaml_file_lists_the_choices(served: Callable[[Answer], None], tmp_path: Path) -> None:
    served(lambda _: httpx.Response(500))
    (tmp_path / "job.yaml").write_text("training_file: file-7\nepochs: 2\n")
    done = run("submit", str(tmp_path / "job.yaml"))
    assert done.exit_code == 2
    assert "'epochs'" in done.stderr and "n_epochs" in done.stderr


def test_a_failed_job_is_exit_status_1_and_says_why(served: Callable[[Answer], None], tmp_path: Path) -> None:
    failed = {
        **JOB,
        "status": "failed",
        "error": {"code": "non_finite_loss", "message": "the loss is NaN", "param": None},
    }
    served(lambda _: httpx.Response(200, json=failed))
    (tmp_path / "job.yaml").write_text("training_file: file-7\nmodel: smollm2\n")
    done = run("submit", str(tmp_path / "job.yaml"), "--json")
    assert done.exit_code == 1
    assert "the loss is NaN" in done.stderr


def test_chat_prints_one_answer(served: Callable[[Answer], None]) -> None:
    frames = "".join(f'data: {{"choices": [{{"delta": {{"content": "{text}"}}}}]}}\n\n' for text in ("Hello", " there"))
    served(lambda _: httpx.Response(200, text=frames + "data: [DONE]\n\n"))
    assert run("chat", "mine", "-m", "Hi").stdout == "Hello there\n"
    assert json.loads(run("chat", "mine", "-m", "Hi", "--json").stdout) == {"model": "mine", "message": "Hello there"}


def test_logs_tell_the_events_oldest_first(served: Callable[[Answer], None]) -> None:
    events = [
        {"id": f"ev-{n}", "created_at": n, "level": "info", "message": f"step {n}", "type": "metrics"} for n in (2, 1)
    ]

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(
            200, json={"data": events, "has_more": False} if request.url.path.endswith("/events") else JOB
        )

    served(answer)
    lines = run("logs", "ftjob-1", "--follow").stdout.splitlines()
    assert [line.split()[-2:] for line in lines] == [["step", "1"], ["step", "2"]]


def test_methods_lists_what_peft_may_say() -> None:
    found = json.loads(run("methods", "--json").stdout)
    names = {method["name"] for method in found}
    kinds = {method["name"]: method["peft"] for method in found}
    assert (kinds["dora"], kinds["vera"], kinds["serial"]) == (["LORA"], ["VERA"], [])
    assert {"lora", "dora", "ia3", "bitfit", "prefix", "serial", "parallel"} <= names
    training = {method["name"]: method["training_bytes"] for method in found}
    assert training["child-tuning"] == 16 * 6_476_005_376 + 4 * 448 and training["bitfit"] == 16 * 1_359_872
    assert run("methods", "nonsense").exit_code == 2


def test_methods_says_of_one_what_it_is_and_what_a_name_means_here() -> None:
    said = run("methods", "spt").stdout
    for words in ("He et al. 2023", "not selective prompt tuning", "Deviations from the paper:", "Choose it when:"):
        assert words in said
    for name, words in (
        ("vpt", "visual prompt tuning"),
        ("cpt", "arXiv 2410.17222), and not the survey's continual prompt tuning"),
        ("prefix-tuning", "`prefix-tuning` and `p-tuning-v2` mean this one, as PREFIX_TUNING does in PEFT"),
    ):
        assert words in " ".join(run("methods", name).stdout.split())
    for name, words in (("s4", "--s4"), ("lorahub", "grafts soup"), ("mole", "output-gated-loras")):
        refused = run("methods", name)
        assert refused.exit_code == 2 and words in " ".join(refused.stderr.replace("│", " ").split())


def test_methods_gives_s4s_union_for_a_budget(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SMOLLM2_CONFIG))
    said = run("methods", "--s4", "1000000", "--config", str(config)).stdout.strip()
    shape = ModelShape.from_config(SMOLLM2_CONFIG)
    assert said == s4(shape, 1_000_000) and 900_000 < BoundGraft(parse(said), shape).parameters <= 1_000_000
    few = run("methods", "--s4", "1000", "--config", str(config))
    assert few.exit_code == 2 and "budget: 1000 is too small" in few.stderr


@pytest.mark.parametrize("home", ["/dev/null", __file__])
def test_a_file_that_cannot_be_read_is_one_line(home: str) -> None:
    result = CliRunner().invoke(app, ["--home", home, "jobs"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "Not a directory" in result.stderr


def test_what_changes_something_says_so_as_json_too(served: Callable[[Answer], None]) -> None:
    served(lambda _: httpx.Response(200, json={}))
    assert json.loads(run("grafts", "delete", "mine@1", "--json").stdout) == {"deleted": "mine@1"}
    assert json.loads(run("backbones", "remove", "other", "--json").stdout) == {"removed": "other"}
