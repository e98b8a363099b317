"""A service over several nodes: Ray's own nodes as processes of this machine, under one head without a device."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import openai
import psutil
import pytest
import ray
import redis
from openai.types.chat import ChatCompletionChunk
from pydantic import JsonValue
from ray import serve
from ray._private.internal_api import node_stats
from ray._private.node import Node
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from polygraft.cluster.answers import RemoteJob
from polygraft.cluster.api_keys import OPERATOR, create_key
from polygraft.cluster.client import ApiFailure, Client
from polygraft.cluster.events import GraftPublished
from polygraft.cluster.model import START
from polygraft.cluster.store.base import Store
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.launch.local_ray import CALLS, PROXY, REPLICAS
from tests.ray.local import TRAIN

LOOPBACK = "127.0.0.1"
NODE_BYTES = 4 << 30
PUT_OFF_S = 240.0  # for which a client tries again
ENVIRONMENT = {
    **TRAIN,
    **PROXY,
    **REPLICAS,
    **dict.fromkeys(CALLS, "5000"),
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",  # to both ingresses, wherever they are
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
    "OMP_NUM_THREADS": "1",
}


class Asked(NamedTuple):
    """What a client asks: so many tokens, sampled where there is a seed."""

    model: str
    ask: str
    tokens: int
    seed: int | None


class Said(NamedTuple):
    """An answer, and the longest that its client waited for a next piece. `broken`: it ended in a protocol error, or
    was a bare 500."""

    text: str
    gap_s: float
    broken: bool = False


@dataclass
class Fleet:
    """The operator's clients, the store, and the processes to be hurt."""

    client: Client
    openai: openai.OpenAI
    store: Store
    server: EmbeddedServer
    home: Path
    cluster: Cluster
    args: Mapping[str, object]
    host: str

    def apply(self, **changes: object) -> None:
        """As the RayService of k8s/ does, with two ingresses, other settings than those before where some are given."""
        self.args = {**self.args, **changes}
        application = {"name": "polygraft", "import_path": "polygraft.launch.serve_app:build", "args": self.args}
        declared = {"applications": [{**application, "deployments": [{"name": "ingress", "num_replicas": 2}]}]}
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(ServeDeploySchema.model_validate(declared))
        until(_running)

    def add_node(self, devices: int) -> Node:
        return self.cluster.add_node(
            num_cpus=2,
            resources={"device": devices},
            memory=NODE_BYTES,
            object_store_memory=100 << 20,
            **_at(self.host),
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

    def of_node(self, node: Node) -> list[psutil.Process]:
        """Ray's processes of the node, and all that it started."""
        pids = [info.process.pid for infos in node.all_processes.values() for info in infos]
        own = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        return [*own, *(child for one in own for child in one.children(recursive=True))]

    def say(self, asked: Asked) -> Said:
        """A streamed answer; one that is put off (503) is asked for again."""
        text, gap_s, last = "", 0.0, time.monotonic()
        while True:
            try:
                for chunk in self._chunks(asked):
                    now = time.monotonic()
                    gap_s, last = max(gap_s, now - last), now
                    text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                return Said(text, gap_s)
            except openai.APIConnectionError as error:  # in a stream's midst, too
                if not isinstance(error.__cause__, httpx2.RemoteProtocolError):
                    raise
                return Said(text, gap_s, broken=True)
            except openai.InternalServerError as error:
                if error.status_code == 503 and not text and time.monotonic() - last < PUT_OFF_S:
                    time.sleep(0.5)
                elif error.status_code == 500:
                    return Said(text, gap_s, broken=True)
                else:
                    raise

    def _chunks(self, asked: Asked) -> Iterator[ChatCompletionChunk]:
        return iter(
            self.openai.chat.completions.create(
                model=asked.model,
                messages=[{"role": "user", "content": asked.ask}],
                max_tokens=asked.tokens,
                temperature=0.0 if asked.seed is None else 1.0,
                seed=asked.seed,
                stream=True,
                extra_body={"ignore_eos": True},
            )
        )

    def computing(self) -> int:
        """How many streams the replicas have; -1 where that is not known of all of them."""
        try:
            loads = [one.load for one in self.client.cluster().replicas]
        except ApiFailure:  # the ingress that was asked dies just now
            return -1
        return sum(-1000 if load is None else load.running + load.waiting for load in loads)

    def alive(self, node: Node) -> bool:
        """Whether Ray has it for alive."""
        return any(one["NodeID"] == node.node_id and one["Alive"] for one in ray.nodes())

    def actors(self, node: str) -> Counter[str]:
        """The classes of the actors that Ray has there."""
        found = ray._private.state.actors(actor_state_name="ALIVE").values()
        return Counter(str(one["ActorClassName"]) for one in found if one["Address"]["NodeID"] == node)

    def left_on(self, node: Node) -> tuple[Counter[str], str]:
        """Why Ray may not let it go: its actors, and the objects that it holds."""
        (there,) = [one for one in ray.nodes() if one["NodeID"] == node.node_id]
        stats = node_stats(there["NodeManagerAddress"], there["NodeManagerPort"])
        return self.actors(node.node_id), str(stats.store_stats)

    def published(self, jobs: Sequence[RemoteJob]) -> Counter[str]:
        """How often each of the jobs was published."""
        events = (stored.event for stored in self.store.events(START, limit=100_000))
        ids = {job.id for job in jobs}
        return Counter(str(one.graft.job) for one in events if isinstance(one, GraftPublished) and one.graft.job in ids)

    def submit(self, backbone: str, count: int, *, epochs: int, devices: int = 1) -> list[RemoteJob]:
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
        hyperparameters: JsonValue = {
            "peft": "lora(r=4)",
            "n_epochs": epochs,
            "batch_size": 2,
        }
        method: JsonValue = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
        return [
            self.client.create_job({"model": backbone, "training_file": file.id, "method": method, "devices": devices})
            for _ in range(count)
        ]


@contextmanager
def nodes(
    home: Path, backbone: Path, *, devices: Sequence[int], settings: Mapping[str, object], host: str = LOOPBACK
) -> Iterator[Fleet]:
    """A service on one node for each number of devices, besides the head's, all at the address `host`. Its default
    backbone is `backbone`."""
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
                **_at(host),
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
                args = {
                    "home": str(home / "home"),
                    "data": str(home / "data"),
                    "backbone": str(backbone),
                    "store_url": _listening(server, host),
                    "dtype": "fp32",
                    **settings,
                }
                fleet = Fleet(client, openai_client, store, server, home, cluster, args, host)
                fleet.apply()
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


def until(holds: Callable[[], bool], seconds: float = 240.0, *, lacking: Callable[[], object] = str) -> float:
    """Wait; the seconds it took. `lacking` says what there is in its place."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, f"it did not come about in time: {lacking()}"
        time.sleep(0.1)
    return time.monotonic() - began


def _at(host: str) -> dict[str, Any]:
    """Of a node there; left to itself Ray takes the machine's own address."""
    return {} if host == LOOPBACK else {"node_ip_address": host}


def _listening(server: EmbeddedServer, host: str) -> str:
    """The store's url at an address of this machine, at which it listens from now on."""
    if host == LOOPBACK:
        return server.url
    with closing(redis.Redis.from_url(server.url)) as client:
        client.config_set("bind", f"{LOOPBACK} {host}")
    return server.url.replace(LOOPBACK, host)


def ingresses_running() -> int:
    """How many ingresses Serve sends clients to."""
    found = serve.status().applications["polygraft"].deployments.values()
    return sum(count for one in found for state, count in one.replica_states.items() if state == "RUNNING")


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
