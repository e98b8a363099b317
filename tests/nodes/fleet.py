"""A service over several nodes: Ray's own nodes as processes of this machine, under one head without a device."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import openai
import psutil
import pytest
import ray
from pydantic import JsonValue
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from polygraft.cluster.answers import RemoteJob
from polygraft.cluster.api_keys import OPERATOR, create_key
from polygraft.cluster.client import Client
from polygraft.cluster.store.base import Store
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.launch.local_ray import PROXY
from tests.ray.local import TRAIN

NODE_BYTES = 4 << 30
ENVIRONMENT = {
    **TRAIN,
    **PROXY,
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
    "OMP_NUM_THREADS": "1",
}


class Said(NamedTuple):
    """An answer, and the longest that its client waited for a next piece."""

    text: str
    gap_s: float


@dataclass
class Fleet:
    """The operator's clients, the store, and the processes to be hurt."""

    client: Client
    openai: openai.OpenAI
    store: Store
    server: EmbeddedServer
    home: Path
    cluster: Cluster

    def add_node(self, devices: int) -> object:
        return self.cluster.add_node(
            num_cpus=2, resources={"device": devices}, memory=NODE_BYTES, object_store_memory=100 << 20
        )

    def processes(self, kind: str) -> list[psutil.Process]:
        """Those of Ray's actors of the class `kind`."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if any(word.startswith(f"ray::{kind}") for word in process.cmdline()[:1]):
                    found.append(process)
            except psutil.Error:  # it ended meanwhile
                continue
        return sorted(found, key=lambda one: one.create_time())

    def kill(self, kind: str) -> int:
        """Kill the oldest such process; its pid."""
        victim = self.processes(kind)[0].pid
        os.kill(victim, signal.SIGKILL)
        return victim

    def say(self, model: str, ask: str, tokens: int, *, seed: int | None) -> Said:
        """A streamed answer of so many tokens, sampled where there is a seed."""
        chunks = self.openai.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": ask}],
            max_tokens=tokens,
            temperature=0.0 if seed is None else 1.0,
            seed=seed,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        text, gap_s, last = "", 0.0, None
        for chunk in chunks:
            now = time.monotonic()
            gap_s, last = max(gap_s, now - last if last else 0.0), now
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        return Said(text, gap_s)

    def submit(self, backbone: str, count: int, *, epochs: int) -> list[RemoteJob]:
        """As many jobs that are equal but for their names."""
        lines = [
            {
                "messages": [
                    {"role": "user", "content": f"What is {n}?"},
                    {"role": "assistant", "content": f"It is {n}."},
                ]
            }
            for n in range(4)
        ]
        path = self.home / "train.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        file = self.client.upload(path)
        hyperparameters: JsonValue = {"peft": "lora(r=4)", "n_epochs": epochs, "batch_size": 2}
        method: JsonValue = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
        return [
            self.client.create_job({"model": backbone, "training_file": file.id, "method": method})
            for _ in range(count)
        ]


@contextmanager
def nodes(home: Path, backbone: Path, *, devices: Sequence[int], settings: Mapping[str, object]) -> Iterator[Fleet]:
    """A service on one node for each number of devices, besides the head's. Its default backbone is `backbone`."""
    scratch = tempfile.mkdtemp(prefix="pg-")
    with pytest.MonkeyPatch.context() as patch, EmbeddedServer(home / "store") as server:
        for name, value in {**ENVIRONMENT, "RAY_TMPDIR": scratch}.items():
            patch.setenv(name, value)
        store = connect(server.url)
        _, key = create_key(store, tenant=OPERATOR, name="test", at=0.0)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "include_dashboard": False,
                "object_store_memory": 100 << 20,
            },
        )
        ray.init(address=cluster.address, log_to_driver=False)
        port = _free_port()
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            url = f"http://127.0.0.1:{port}"
            with (
                Client(url, key) as client,
                openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as openai_client,
            ):
                fleet = Fleet(client, openai_client, store, server, home, cluster)
                args = {
                    "home": str(home / "home"),
                    "data": str(home / "data"),
                    "backbone": str(backbone),
                    "store_url": server.url,
                    "dtype": "fp32",
                    **settings,
                }
                _apply({"name": "polygraft", "import_path": "polygraft.launch.serve_app:build", "args": args})
                for count in devices:  # only now: the ingresses are on the head, which nobody kills
                    fleet.add_node(count)
                yield fleet
        finally:
            _end_controllers()
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()
            store.close()
            shutil.rmtree(scratch, ignore_errors=True)


def until(holds: Callable[[], bool], seconds: float = 120.0) -> float:
    """Wait; the seconds it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, "it did not come about in time"
        time.sleep(0.1)
    return time.monotonic() - began


def _apply(application: Mapping[str, object]) -> None:
    """As the RayService of k8s/ does, with two ingresses."""
    ingresses = {"name": "ingress", "num_replicas": 2}
    client = _get_global_client()
    assert client is not None
    declared = {"applications": [{**application, "deployments": [ingresses]}]}
    client.deploy_apps(ServeDeploySchema.model_validate(declared))
    until(_running)


def _running() -> bool:
    found = serve.status().applications.get("polygraft")
    assert found is None or found.status not in ("DEPLOY_FAILED", "UNHEALTHY"), found
    return found is not None and found.status == "RUNNING"


def _end_controllers() -> None:
    for one in ray.util.list_named_actors(all_namespaces=True):
        if one["name"].startswith("controller-"):
            ray.kill(ray.get_actor(one["name"], namespace=one["namespace"]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
