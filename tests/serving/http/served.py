"""The service's ingress and controller in one process of their own, over a real store and a real engine on the tiny
Llama, without Ray and without packs: jobs wait for a device. Run as a module by `served` in conftest.py; it ends with
its standard input."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
import uvicorn

from polygraft.cluster.actors.controller import Controller
from polygraft.cluster.actors.protocols import PackEnd
from polygraft.cluster.api_keys import create_key
from polygraft.cluster.model import Device, Limits, Pack, PackId, Replica, ReplicaId, TenantId
from polygraft.cluster.settings import LimitSettings, ServeSettings
from polygraft.cluster.size import Size
from polygraft.cluster.store.connect import connect
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.serving.adoption import Adoption, ReaderPlan
from polygraft.serving.engine import Engine
from polygraft.serving.gateway import Gateway
from polygraft.serving.http.app import create_app
from polygraft.serving.http.connection import Connection
from polygraft.serving.local import LocalLink
from tests.serving.http.apis import tiny_api

SETTINGS = ServeSettings(max_streams=8, max_queued=64, max_context=160, kv_bytes=4 << 20, max_rows=64)
TENANTS = ("ann", "bob")


@dataclass(frozen=True)
class Served:
    """Where it listens, its tenants' keys, and its process."""

    url: str
    keys: Mapping[str, str]
    pid: int

    @property
    def rss(self) -> int:
        return int(psutil.Process(self.pid).memory_info().rss)

    def headers(self, tenant: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[tenant]}"}


class NoDevices:
    """Effects of a cluster whose devices are all elsewhere."""

    def open_pack(self, pack: Pack) -> None:
        raise AssertionError(f"{pack.id} was opened on no device")

    def close_pack(self, pack: PackId) -> None: ...

    def alive(self) -> Collection[PackId]:
        return ()

    def ended(self) -> Sequence[PackEnd]:
        return ()

    def serve(self, backbones: Collection[object]) -> None: ...

    def devices(self) -> Collection[Device]:
        return ()

    def sizes(self, backbone: object, devices: object) -> tuple[Size, ...]:
        return ()

    def draining(self) -> Collection[str]:
        return ()

    def gone(self, replicas: Collection[Replica]) -> Collection[ReplicaId]:
        return ()


def main(folder: Path, data: Path, store_url: str) -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    store = connect(store_url)
    backbone = Backbone.load(folder, torch.float32)
    engine = Engine(backbone, SETTINGS, replica=ReplicaId("r0"), data=data)
    engine.start()
    plan = ReaderPlan(backbone_folder=folder, quantise=None, memory_bytes=1 << 30, seconds=30.0)
    gateway = Gateway({ReplicaId("r0"): LocalLink(engine)}, ingress="i0", settings=SETTINGS)
    limits = LimitSettings(upload_bytes=8 << 20, graft_bytes=8 << 20, body_s=5.0)
    api = tiny_api(store, gateway, backbone, data, Adoption(plan), max_context=SETTINGS.max_context)
    api = replace(api, limits=limits)
    controller = Controller(store, NoDevices(), limits=Limits(), holder="c0")
    threading.Thread(target=controller.run, args=(threading.Event(),), daemon=True).start()
    keys = {tenant: create_key(store, tenant=TenantId(tenant), name="test", at=0.0)[1] for tenant in TENANTS}
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(4096)  # before anybody is told of it
        config = uvicorn.Config(create_app(api), http=Connection, log_level="warning", backlog=4096)
        server = uvicorn.Server(config)
        threading.Thread(target=_end_with_input, args=(server,), daemon=True).start()
        port = listening.getsockname()[1]
        answers.write(json.dumps({"url": f"http://127.0.0.1:{port}", "keys": keys, "pid": os.getpid()}) + "\n")
        answers.flush()
        server.run(sockets=[listening])
    engine.stop()


def _end_with_input(server: uvicorn.Server) -> None:
    sys.stdin.read()
    server.should_exit = True


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
