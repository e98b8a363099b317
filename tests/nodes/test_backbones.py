"""Two backbones of different families in one service, deployed as KubeRay deploys it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import ray
import torch
from pydantic import JsonValue
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from polygraft.cluster.answers import RemoteJob
from polygraft.cluster.api_keys import OPERATOR, create_key
from polygraft.cluster.client import Client
from polygraft.cluster.model import JobId
from polygraft.cluster.store import keys
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.grafts.formats import native
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.text.message import Message
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers.prepare import prepare
from polygraft.trainers.runner import PackRunner
from tests.ray.local import local_ray
from tests.serving.naive import Solo
from tests.tiny import tiny_llama, tiny_model

ASK = [{"role": "user", "content": "What is a graft?"}]
TOKENS = 24
UNLOAD_S = 12.0


@pytest.mark.timeout(480)
def test_two_backbones_answer_and_train_as_alone_and_one_is_unloaded_and_loaded_again(tmp_path: Path) -> None:
    own, other = tiny_llama(tmp_path / "own"), tiny_model(tmp_path / "other", "qwen3", seed=3)
    alone = {str(own): said_alone(own), "other": said_alone(other)}
    with EmbeddedServer(tmp_path / "store") as server, service(tmp_path, server.url, own) as (client, config):
        client.add_backbone("other", str(other), dtype="fp32", quantise=None)
        assert state(client, "other") == "unloaded"
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda model: says(client, model), [*alone] * 2)) == [*alone.values()] * 2

        replicas = engines()
        assert set(replicas) == {"backbone-other", *replicas} and len(replicas) == 2
        for change in ({}, {"graceful_shutdown_timeout_s": 7}):  # what a RayService is applied with: again, and changed
            apply(config, change)
            assert engines() == replicas, "it names the ingress alone, and leaves the backbones as they are"
        assert {model: says(client, model) for model in alone} == alone

        job = submitted(client, tmp_path)
        kept = {name: process for name, process in replicas.items() if name != "backbone-other"}
        until(lambda: says(client, str(own)) == alone[str(own)] and engines() == kept)
        until(lambda: state(client, "other") == "unloaded")  # which an ingress reads every second
        assert client.wait(job.id).status == "succeeded"
        assert says(client, "other") == alone["other"], "it waits for the replica"
        assert trained_alone(other, server.url, tmp_path, job) == client.job(job.id).graft
        client.remove_backbone("other")
        until(lambda: "backbone-other" not in engines())


@contextmanager
def service(tmp_path: Path, store_url: str, own: Path) -> Iterator[tuple[Client, Mapping[str, object]]]:
    """The operator's client of a service whose Serve configuration names nothing but the ingress."""
    store = connect(store_url)
    _, key = create_key(store, tenant=OPERATOR, name="test", at=0.0)
    store.close()
    settings = {
        "home": str(tmp_path / "home"),
        "data": str(tmp_path / "data"),
        "backbone": str(own),
        "store_url": store_url,
        "dtype": "fp32",
        "unload_s": UNLOAD_S,
        "serve": {"max_context": 256, "kv_bytes": 8 << 20},
    }
    config = {"name": "polygraft", "import_path": "polygraft.launch.serve_app:build", "args": settings}
    with local_ray({}, devices=2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        apply(config, {})
        try:
            with Client(f"http://127.0.0.1:{port}", key) as client:
                yield client, config
        finally:
            for one in ray.util.list_named_actors(all_namespaces=True):
                if one["name"].startswith("controller-"):
                    leader = ray.get_actor(one["name"], namespace=one["namespace"])
                    ray.get(leader.stop.remote())
                    ray.kill(leader)
            serve.shutdown()


def apply(config: Mapping[str, object], change: Mapping[str, object]) -> None:
    """What the dashboard's REST API does with a serveConfigV2; returns when its application is up."""
    deployments = [{"name": "ingress", **change}] if change else []
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": [{**config, "deployments": deployments}]}))
    until(lambda: running("polygraft"))


def running(application: str) -> bool:
    found = serve.status().applications.get(application)
    assert found is None or found.status not in ("DEPLOY_FAILED", "UNHEALTHY"), found
    return found is not None and found.status == "RUNNING"


def engines() -> dict[str, int]:
    """The processes that hold a backbone, by their applications."""
    found, line = {}, ""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ends just now
            line = " ".join(process.cmdline())
        if "ServeReplica:backbone-" in line:
            found[line.partition("ServeReplica:")[2].partition(":")[0]] = process.pid
    return found


def state(client: Client, backbone: str) -> str:
    return next(one.state for one in client.backbones() if one.id == backbone)


def says(client: Client, model: str) -> str:
    return "".join(client.chat(model, ASK, max_tokens=TOKENS, temperature=0))


def said_alone(folder: Path) -> str:
    tokeniser, shape = Tokeniser.load(folder), ModelShape.from_config(json.loads((folder / "config.json").read_text()))
    prompt = tokeniser.encode_chat([Message("user", ASK[0]["content"])], add_generation_prompt=True)
    said = Solo(folder, shape, None, {}).greedy(prompt, TOKENS)
    end = next((i for i, id in enumerate(said) if id in tokeniser.eos_ids), TOKENS)
    return tokeniser.decode([*prompt, *said[:end]]).removeprefix(tokeniser.decode(prompt))


def submitted(client: Client, tmp_path: Path) -> RemoteJob:
    line = {"messages": [*ASK, {"role": "assistant", "content": "A shoot."}]}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(line)}\n" * 4)
    file = client.upload(tmp_path / "train.jsonl")
    hyperparameters: JsonValue = {"peft": "lora(r=4)", "n_epochs": 2, "batch_size": 2}
    method: JsonValue = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    return client.create_job({"model": "other", "training_file": file.id, "suffix": "mine", "method": method})


def trained_alone(folder: Path, store_url: str, tmp_path: Path, job: RemoteJob) -> str:
    """The graft that the job gives in a pack of its own, in this process."""
    store = connect(store_url)
    record = store.get(keys.job(JobId(job.id)))
    store.close()
    assert record is not None
    backbone = Backbone.load(folder, torch.float32)
    trained = prepare(
        record.value,
        files=tmp_path / "data" / "files",
        tokeniser=Tokeniser.load(folder),
        backbone_files=BackboneFiles(folder),
        micro_rows=128,
    )
    runner = PackRunner(backbone)
    running = runner.admit(trained)
    while not running.finished:
        runner.step()
    return native.graft_id(trained.graft.spec, running.slab.tensors, backbone.fingerprint)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90.0
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.2)
