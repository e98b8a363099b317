"""Devices of a real Ray: a node whose four GPUs are only said to be there, and a node of two CPU devices."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import ray
from ray import cloudpickle
from ray._private.accelerators import NvidiaGPUAcceleratorManager
from ray.actor import ActorHandle
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.cluster_utils import Cluster
from ray.exceptions import RayActorError

from polygraft.cluster.actors.discovery import GpuFacts, NodeFacts
from polygraft.cluster.actors.effects import Means, RayEffects
from polygraft.cluster.actors.place import asking, place
from polygraft.cluster.leasing import close_replica, open_replica
from polygraft.cluster.model import Device, DeviceKind, Occupancy, ReplicaId
from polygraft.cluster.settings import load
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, Write
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.embedded import EmbeddedServer
from polygraft.launch.machine import Machine

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import the tests
GIB = 1 << 30


class DeviceProcess:
    """What computes on a device leases it first, all of it."""

    def __init__(self, url: str, name: str) -> None:
        here = place()
        _, self._device = open_replica(
            connect(url),
            ReplicaId(name),
            backbone="b",
            bytes_of=lambda device: device.bytes,
            actor=name,
            node=here.node,
            index=here.index,
            at=time.time(),
        )

    def device(self) -> str:
        return self._device.id

    def visible(self) -> str:
        import os

        return os.environ.get("CUDA_VISIBLE_DEVICES", "")


def four_gpus(_cores: int) -> NodeFacts:
    return NodeFacts(cpu_speed=1e11, gpus=tuple(GpuFacts(index, 24 * GIB, 1e14) for index in range(4)))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    home = tempfile.mkdtemp(prefix="pg-")
    with pytest.MonkeyPatch.context() as patch:
        fake = {"num_accelerators": lambda: 4, "accelerator_type": lambda: "H200"}
        for name, told in fake.items():
            patch.setattr(NvidiaGPUAcceleratorManager, f"get_current_node_{name}", staticmethod(told))
        patch.setenv("RAY_TMPDIR", home)
        machine = Machine.here(load(home=Path(home)))
        head = {"num_cpus": 4, "num_gpus": machine.gpus, "resources": {"device": machine.devices(None)}}
        more = {"object_store_memory": 80 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args={**head, **more})
        cluster.add_node(object_store_memory=80 << 20, num_cpus=2, num_gpus=0, memory=8 * GIB, resources={"device": 2})
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def devices(cluster: Cluster) -> Mapping[str, Device]:
    """As they are discovered."""
    effects = RayEffects(Means(pytest.fail, pytest.fail, four_gpus))  # type: ignore[arg-type]
    until(lambda: len(effects.devices()) == 6 and all(device.speed for device in effects.devices()))
    return {device.id: device for device in effects.devices()}


@pytest.fixture
def server(tmp_path: Path, devices: Mapping[str, Device]) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path / "store") as server:
        store = connect(server.url)
        store.commit([Write(keys.device(one.id), Occupancy(device=one), 0) for one in devices.values()])
        store.close()
        yield server


def started(server: EmbeddedServer, kind: DeviceKind, share: float, *names: str) -> list[ActorHandle[DeviceProcess]]:
    remote = ray.remote(DeviceProcess)
    return [remote.options(**asking(kind, share)).remote(server.url, name) for name in names]  # type: ignore[misc]


def test_the_nodes_devices_are_found(devices: Mapping[str, Device]) -> None:
    gpus = sorted(device.index for device in devices.values() if device.kind == "cuda")
    cpus = [device for device in devices.values() if device.kind == "cpu"]
    assert gpus == [0, 1, 2, 3] and sorted(device.index for device in cpus) == [0, 1]
    assert [(device.cores, device.bytes) for device in cpus] == [(1, 4 * GIB)] * 2
    assert len({device.node for device in devices.values()}) == 2


def test_four_processes_have_four_gpus_and_a_fifth_waits_in_ray_s_own_demand(server: EmbeddedServer) -> None:
    processes = started(server, "cuda", 1.0, *"abcd")
    devices: list[str] = ray.get([process.device.remote() for process in processes])
    assert sorted(device.rpartition("/")[2] for device in devices) == ["cuda0", "cuda1", "cuda2", "cuda3"]
    assert sorted(ray.get([process.visible.remote() for process in processes])) == ["0", "1", "2", "3"]
    (fifth,) = started(server, "cuda", 1.0, "e")
    until(lambda: any(demand.get("GPU") == 1.0 for demand in demands()))
    ray.kill(processes.pop())
    release(server, "d")
    assert ray.get(fifth.device.remote()) == devices[3], "the one that is free again"  # type: ignore[comparison-overlap]
    for process in (*processes, fifth):
        ray.kill(process)


def test_two_that_start_at_once_take_different_devices_and_ray_s_shares_give_no_third_any_bytes(
    server: EmbeddedServer,
) -> None:
    processes = started(server, "cpu", 0.25, "a", "b")
    assert {one.rpartition("/")[2] for one in ray.get([process.device.remote() for process in processes])} == {  # type: ignore[var-annotated]
        "cpu0",
        "cpu1",
    }
    (third,) = started(server, "cpu", 0.25, "c")
    with pytest.raises(RayActorError, match="0 bytes free of the 4,294,967,296"):
        ray.get(third.device.remote())
    for process in processes:
        ray.kill(process)


def demands() -> list[Mapping[str, float]]:
    """What Ray's autoscaler is told is missing."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    waiting = status.resource_demands.ray_task_actor_demand
    return [bundle.bundle for demand in waiting for bundle in demand.bundles_by_count]


def release(server: EmbeddedServer, name: str) -> None:
    """What the controller does when a process is gone."""
    store: Store = connect(server.url)
    close_replica(store, ReplicaId(name), at=time.time())
    store.close()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)
