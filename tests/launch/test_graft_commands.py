"""`polygraft grafts ...` against a service in this process, over HTTP."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from typer.testing import CliRunner, Result

from polygraft.cluster.api_keys import create_key
from polygraft.cluster.client import Client
from polygraft.cluster.model import Graft, TenantId
from polygraft.cluster.publish import resolve
from polygraft.cluster.settings import ServeSettings
from polygraft.cluster.store.memory import MemoryStore
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native, peft
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.launch.commands.common import Flags
from polygraft.launch.main import app
from polygraft.serving.adoption import Adoption, ReaderPlan
from polygraft.serving.gateway import Gateway
from polygraft.serving.http.app import create_app
from polygraft.serving.residency import Residency
from tests.grafts.oracle.row import random_tensors
from tests.serving.http.apis import tiny_api
from tests.tiny import tiny_llama


@dataclass
class Running:
    """A service without engines, its store, and what its grafts grow on."""

    store: MemoryStore
    data: Path
    backbone: Backbone

    def meant(self, model: str) -> Graft:
        return resolve(self.store, TenantId("local"), model)

    def folder(self, model: str) -> Path:
        return self.data / "grafts" / self.meant(model).id

    def saved(self, root: Path, text: str, seed: int = 0) -> tuple[Path, BoundGraft, dict[str, torch.Tensor]]:
        """A native folder with random tensors."""
        bound = BoundGraft(parse(text), self.backbone.shape)
        values = {name: value.float() for name, value in random_tensors(bound, seed).items()}
        return root / native.save(root, bound, values, backbone=self.backbone.fingerprint), bound, values


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Client]]:
    scratch = tmp_path_factory.mktemp("service")
    folder, data = tiny_llama(scratch / "tiny"), scratch / "data"
    backbone, store, serve = Backbone.load(folder, torch.float32), MemoryStore(), ServeSettings()
    _, key = create_key(store, tenant=TenantId("local"), name="test", at=0.0)
    plan = ReaderPlan(backbone_folder=folder, quantise=None, memory_bytes=1 << 30, seconds=60.0)
    api = tiny_api(store, Gateway({}, ingress="i", settings=serve), backbone, data, Adoption(plan))
    api = replace(api, clock=lambda: 0.0)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(api), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        with Client(f"http://127.0.0.1:{listening.getsockname()[1]}", key) as client:
            while not server.started:
                time.sleep(0.01)
            yield Running(store, data, backbone), client
        server.should_exit = True
        thread.join()


@pytest.fixture
def running(service: tuple[Running, Client], monkeypatch: pytest.MonkeyPatch) -> Running:
    """Every command's client talks to it, and a home that says otherwise is nobody's."""
    found, client = service
    monkeypatch.setattr(client, "close", lambda: None)  # until the last test
    monkeypatch.setattr(Flags, "client", lambda _: client)
    monkeypatch.setattr(Flags, "backbone", lambda *_: (str(found.backbone.folder), None))
    return found


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_graft_made_elsewhere_is_imported_and_served_by_its_name(running: Running, tmp_path: Path) -> None:
    backbone = running.backbone
    bound = BoundGraft(parse("oft(b=8)"), backbone.shape)
    values = {name: value + 0.1 for name, value in initialise(bound, backbone, seed=0, samples=()).items()}
    (tmp_path / "theirs").mkdir()
    peft.export(tmp_path / "theirs", bound, values)
    (tmp_path / "theirs/runs").mkdir()
    # The service's own settings decide: those of the home are never read.
    home = ("--home", tmp_path / "home")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/config.yaml").write_text("backbone: elsewhere\ndata: /nowhere\n")
    done = run(*home, "grafts", "import", tmp_path / "theirs", "oft")
    assert (done.exit_code, done.stdout) == (0, "oft@1\n"), done.stderr
    assert running.meant("oft").backbone_fingerprint == backbone.fingerprint
    resident = Residency(folder=running.data / "grafts", backbone=backbone, budget_bytes=1 << 20)
    assert {slot.op for slot in resident.fetch(running.meant("oft").id).spec.slots} == {"rotate"}
    done = run(*home, "grafts", "import", tmp_path / "theirs", "oft", "--backbone", "tiny", "--promote")
    assert done.stdout == "oft@2\n" and running.meant("oft").version == 2
    done = run(*home, "grafts", "import", tmp_path / "theirs", "oft", "--backbone", tmp_path)
    assert done.exit_code == 2 and "the service has tiny" in done.stderr.replace("\n", " ")
    done = run(*home, "grafts", "import", tmp_path / "theirs", "Oft")
    assert done.exit_code == 1 and "name: 'Oft'" in done.stderr
    assert run(*home, "grafts", "import", tmp_path / "none", "oft").exit_code == 2
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "theirs/adapter_config.json").unlink()
    (tmp_path / "theirs/adapter_config.json").symlink_to(tmp_path / "secret")
    done = run(*home, "grafts", "import", tmp_path / "theirs", "oft")
    assert done.exit_code == 2 and "adapter_config.json" in done.stderr


def test_a_folder_of_folders_is_imported_each_under_its_own_name(running: Running, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for seed, name in enumerate(("ants", "bees", "Cats")):
        running.saved(tmp_path, "ia3", 10 + seed)[0].rename(tmp_path / "many" / name)
    done = run("grafts", "import", tmp_path / "many", "--each")
    assert (done.exit_code, done.stdout) == (1, "ants@1\nbees@1\n")
    assert "Cats: name: 'Cats'" in done.stderr and "1 of 3 folders" in done.stderr
    assert run("grafts", "import", tmp_path / "many").exit_code == 2
    assert run("grafts", "import", tmp_path / "many", "ants", "--each").exit_code == 2


def test_a_soup_is_made_of_the_services_grafts_and_served_by_its_name(running: Running, tmp_path: Path) -> None:
    members = []
    for seed, (name, text) in enumerate((("one", "lora(r=2)"), ("two", "lora(r=2)"), ("odd", "ia3"))):
        folder, _, values = running.saved(tmp_path, text, seed)
        members.append(values)
        assert run("grafts", "import", folder, name).stdout == f"{name}@1\n"
    done = run("grafts", "soup", "mean", "one", "two@1")
    assert (done.exit_code, done.stdout) == (0, "mean@1\n"), done.stderr
    backbone = running.backbone
    made = native.load(running.folder("mean"), shape=backbone.shape, backbone=backbone.fingerprint).tensors
    assert all(torch.allclose(value, (members[0][n] + members[1][n]) / 2) for n, value in made.items())
    few = tmp_path / "few.jsonl"
    example = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A graft."}]}
    few.write_text(json.dumps(example) + "\n")
    done = run("grafts", "soup", "mean", "one", "two", "--examples", few, "--steps", "12")
    assert (done.exit_code, done.stdout) == (0, "mean@2\n") and "weights" in done.stderr
    done = run("grafts", "soup", "mean", "one", "odd")
    assert done.exit_code == 2 and "not of one spec" in done.stderr.replace("\n", " ")
    done = run("grafts", "soup", "mean", "one", "nobody")
    assert done.exit_code == 4 and "'nobody' does not exist" in done.stderr.replace("\n", " ")


def test_a_fine_tuned_model_becomes_a_graft_of_signs_and_distilled_scales(running: Running, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "tuned", seed=1)
    tiny_llama(tmp_path / "wider", ffn=128)
    few = tmp_path / "few.jsonl"
    few.write_text(
        json.dumps({"messages": [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "In winter."}]})
    )
    done = run("grafts", "bitdelta", tmp_path / "tuned", "signs", "--examples", few, "--steps", "3")
    assert (done.exit_code, done.stdout) == (0, "signs@1\n"), done.stderr
    assert "not in the graft, though it was tuned: model.embed_tokens.weight" in done.stderr
    assert "logits' squared distance" in done.stderr
    assert running.meant("signs").method == "bitdelta(at=linear)"
    residency = Residency(folder=running.data / "grafts", backbone=running.backbone, budget_bytes=1 << 20)
    resident = residency.fetch(running.meant("signs").id)
    assert all(bool((value > 0).all()) for name, value in resident.tensors.items() if name.endswith(".a"))
    done = run("grafts", "bitdelta", tmp_path / "wider", "other")
    assert done.exit_code == 2 and "ffn=128" in done.stderr


def test_names_move_versions_go_and_the_list_says_what_each_grows_on(running: Running, tmp_path: Path) -> None:
    for seed in (1, 2):
        assert run("grafts", "import", running.saved(tmp_path, "ia3", seed)[0], "poems").exit_code == 0
    rows = [line.split() for line in run("grafts", "list").stdout.splitlines() if line.startswith("poems")]
    assert [row[:4] for row in rows] == [["poems@1", "poems", "ia3", "tiny"], ["poems@2", "ia3", "tiny", rows[1][3]]]
    assert {"poems@1", "poems@2"} <= {one["id"] for one in json.loads(run("grafts", "list", "--json").stdout)}
    assert run("grafts", "promote", "poems@2").stdout == "poems@2\n" and running.meant("poems").version == 2
    assert run("grafts", "rollback", "poems").stdout == "poems@1\n" and running.meant("poems").version == 1
    done = run("grafts", "delete", "poems@1")
    assert done.exit_code == 1 and "promote another version" in done.stderr.replace("\n", " ")
    assert run("grafts", "delete", "poems@2").exit_code == 0
    assert run("grafts", "promote", "poems@2").exit_code == 4


def test_a_graft_is_exported_as_a_model_or_in_the_format_asked_for(running: Running, tmp_path: Path) -> None:
    backbone = running.backbone
    bound = BoundGraft(parse("loha(r=2, at=attn.q)"), backbone.shape)
    values = {name: value + 0.1 for name, value in initialise(bound, backbone, seed=0, samples=()).items()}
    folder = tmp_path / native.save(tmp_path, bound, values, backbone=backbone.fingerprint)
    assert run("grafts", "import", folder, "loha").exit_code == 0

    def export(target: str, *flags: str, graft: str | Path = "loha") -> Result:
        return run("grafts", "export", graft, tmp_path / target, *flags)

    assert export("whole").exit_code == 0
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    again = export("whole")
    assert again.exit_code == 2 and "exists already" in again.stderr
    done = export("lora", "--rank", "4")
    assert done.exit_code == 0 and "lost 0.00%" in done.stdout
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 4
    assert export("theirs", "--format", "peft", graft=folder).exit_code == 0
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["peft_type"] == "LOHA"
    beside = ("--backbone", str(backbone.folder), "--format")
    done = export("a.gguf", *beside, "gguf", graft=tmp_path / "theirs")
    assert done.exit_code == 2 and "give a rank or an energy" in done.stderr
    assert export("a.gguf", *beside, "gguf", "--rank", "4", graft=tmp_path / "theirs").exit_code == 0
    assert (tmp_path / "a.gguf").read_bytes()[:4] == b"GGUF"
    done = export("ours", "--format", "native")
    assert done.exit_code == 0 and (tmp_path / "ours" / done.stdout.strip() / "graft.json").is_file()
    assert done.stdout.strip() == running.meant("loha").id
    done = export("x", "--format", "peft", graft=backbone.folder)
    assert done.exit_code == 2 and "holds no adapter_config.json" in done.stderr
    assert export("x", graft="nobody").exit_code == 4


def test_commands_take_the_backbones_that_the_running_service_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the settings of whoever calls them: the service may have been started with flags."""
    flags = Flags(home=tmp_path)
    (tmp_path / "config.yaml").write_text("backbone: another\n")
    assert flags.backbone(None) == ("another", None)
    common = {"object": "backbone", "dtype": "auto", "context_length": 8, "state": "loaded", "added_at": 1}
    big = {**common, "id": "big", "default": True, "path": "/models/big", "quantise": "nf4", "fingerprint": "f1"}
    small = {**common, "id": "small", "default": False, "path": "/models/small", "quantise": None, "fingerprint": "f2"}
    answer = httpx.Response(200, json={"data": [big, small], "has_more": False})
    client = Client("http://service", "pg-key", transport=httpx.MockTransport(lambda _: answer))
    monkeypatch.setattr(Flags, "client", lambda _: client)
    monkeypatch.setattr(client, "close", lambda: None)
    assert flags.backbone(None) == flags.backbone("big") == ("/models/big", "nf4")
    assert flags.backbone("small") == flags.backbone(None, "f2") == ("/models/small", None)
    assert flags.backbone(None, "nobody's") == ("/models/big", "nf4")
    assert flags.backbone("/models/mine") == ("/models/mine", "nf4"), "as the service's own"
