"""A Ray of the test's own that leaves nothing behind."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import ray

from polygraft.cluster.model import Device, DeviceId, Occupancy
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, Write
from polygraft.launch.local_ray import PROXY

TRAIN = {  # a worker starts in seconds instead of half a minute
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
}


@contextmanager
def local_ray(environment: Mapping[str, str], *, devices: int = 1, dashboard_port: int = 0) -> Iterator[None]:
    """Processes that Ray starts get `environment`; Ray's own folder is short, since socket paths are. With a port there
    is a dashboard."""
    home = tempfile.mkdtemp(prefix="pg-")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**TRAIN, **PROXY, **environment}.items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=2,
            resources={"device": devices},
            include_dashboard=dashboard_port > 0,
            **({"dashboard_port": dashboard_port} if dashboard_port else {}),  # type: ignore[arg-type]
            log_to_driver=False,
            object_store_memory=100 * 2**20,
            _temp_dir=home,
        )
        try:
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(home, ignore_errors=True)


def write_devices(store: Store, count: int) -> None:
    """What a controller would find: the node's devices, each of a GiB."""
    node = ray.nodes()[0]["NodeID"]
    for index in range(count):
        device = Device(
            id=DeviceId(f"{node}/cpu{index}"), node=node, kind="cpu", index=index, cores=1, bytes=1 << 30, speed=1e9
        )
        store.commit([Write(keys.device(device.id), Occupancy(device=device), 0)])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
