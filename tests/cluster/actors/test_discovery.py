"""The devices of a node, from what Ray says of it and what was measured there."""

from __future__ import annotations

import pytest

from polygraft.cluster.actors.discovery import GpuFacts, NodeFacts, devices_of

GIB = 1 << 30
NODE = {"CPU": 5.0, "memory": 10.0 * GIB, "device": 2.0, "node:10.0.0.1": 1.0}


def test_devices_of_a_cpu_node_share_its_cores_and_its_memory() -> None:
    first, second = devices_of("n", NODE, NodeFacts(cpu_speed=3e11))
    assert (first.id, second.id) == ("n/cpu0", "n/cpu1") and (first.index, second.index) == (0, 1)
    for device in (first, second):
        assert (device.node, device.kind, device.cores, device.bytes, device.speed) == ("n", "cpu", 2, 5 * GIB, 3e11)


def test_a_cpu_node_has_its_devices_before_they_are_measured() -> None:
    assert [device.speed for device in devices_of("n", NODE, None)] == [0.0, 0.0]


def test_a_node_that_has_fewer_cores_than_devices_gives_each_one() -> None:
    assert [device.cores for device in devices_of("n", NODE | {"CPU": 1.0}, None)] == [1, 1]


def test_a_node_with_gpus_has_a_device_a_gpu_once_they_are_measured() -> None:
    gpus = NODE | {"GPU": 2.0, "CPU": 16.0}
    assert list(devices_of("n", gpus, None)) == []
    facts = NodeFacts(gpus=tuple(GpuFacts(index, 24 * GIB, 1e14) for index in range(2)))
    found = list(devices_of("n", gpus, facts))
    assert [(one.id, one.kind, one.index) for one in found] == [("n/cuda0", "cuda", 0), ("n/cuda1", "cuda", 1)]
    assert {(one.cores, one.bytes, one.speed) for one in found} == {(8, 24 * GIB, 1e14)}


@pytest.mark.parametrize("resources", [{"CPU": 4.0}, {"device": 0.0, "CPU": 4.0}])
def test_a_node_that_declares_none_has_none(resources: dict[str, float]) -> None:
    assert list(devices_of("n", resources, None)) == []
