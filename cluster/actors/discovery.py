"""Which devices there are: node by node, from what Ray knows of a node and from what a scout measured on it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import state
from ray.exceptions import RayError

from polygraft.cluster.actors.protocols import DEVICE
from polygraft.cluster.model import Device, DeviceId

LOG = logging.getLogger(__name__)
LIST_S = 2.0  # how long a list of nodes is used
NODE_LABEL = "ray.io/node-id"


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """`index` is Ray's; `bytes` what may be given out; `speed` as of `Device`."""

    index: int
    bytes: int
    speed: float


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What only a process on the node can say: the speed of a device there that has a share of its cores, and its
    GPUs."""

    cpu_speed: float = 0.0
    gpus: tuple[GpuFacts, ...] = ()


Scout = Callable[[int], NodeFacts]  # told the cores of a device of its node; runs there, in a process of its own


def devices_of(node: str, resources: Mapping[str, float], facts: NodeFacts | None) -> Iterator[Device]:
    """The devices of a node with these resources: its GPUs once they are measured, else the devices that it declares,
    each with as much of its cores and memory as any other, their speed 0 until that is measured."""
    cores, memory = max(1, int(resources.get("CPU", 0))), int(resources.get("memory", 0))
    if gpus := int(resources.get("GPU", 0)):
        for gpu in facts.gpus[:gpus] if facts else ():
            yield Device(
                id=DeviceId(f"{node}/cuda{gpu.index}"),
                node=node,
                kind="cuda",
                index=gpu.index,
                cores=max(1, cores // gpus),
                bytes=gpu.bytes,
                speed=gpu.speed,
            )
        return
    count = int(resources.get(DEVICE, 0))
    for index in range(count):
        yield Device(
            id=DeviceId(f"{node}/cpu{index}"),
            node=node,
            kind="cpu",
            index=index,
            cores=max(1, cores // count),
            bytes=memory // count,
            speed=facts.cpu_speed if facts else 0.0,
        )


@ray.remote(num_cpus=0, max_calls=1, max_retries=2)  # the process ends with it, and torch
def _measured(scout: Scout, cores: int) -> NodeFacts:
    return scout(cores)


class Discovery:
    """The devices of the nodes that are alive. `scout`, where there is one, is sent to each node once."""

    def __init__(self, scout: Scout | None = None, *, list_s: float = LIST_S) -> None:
        self._scout, self._list_s = scout, list_s
        self._sent: dict[str, ray.ObjectRef[NodeFacts]] = {}
        self._facts: dict[str, NodeFacts] = {}
        self._devices: Sequence[Device] = ()
        self._draining: Sequence[str] = ()
        self._listed_at = float("-inf")

    def devices(self) -> Sequence[Device]:
        if time.monotonic() - self._listed_at > self._list_s:
            self._listed_at = time.monotonic()
            self._devices = list(self._look())
            self._draining = sorted(state.get_draining_nodes())
        return self._devices

    @property
    def measuring(self) -> bool:
        """Whether a scout is underway, of what was looked at last."""
        return self._sent.keys() != self._facts.keys()

    def draining(self) -> Sequence[str]:
        """The nodes that were told to go, by whoever looks after machines: an autoscaler, a cloud's notice, `polygraft
        drain`. As of the last `devices`."""
        return self._draining

    def _look(self) -> Iterator[Device]:
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            id_, resources = str(node["NodeID"]), node["Resources"]
            if node["Alive"] and resources.get(DEVICE, 0) >= 1:
                yield from devices_of(id_, resources, self._facts_of(id_, resources))

    def _facts_of(self, node: str, resources: Mapping[str, float]) -> NodeFacts | None:
        if self._scout is None or node in self._facts:
            return self._facts.get(node)
        if node not in self._sent:
            cores = max(1, int(resources.get("CPU", 0)) // int(resources[DEVICE]))
            task = _measured.options(label_selector={NODE_LABEL: node}, name="scout")
            self._sent[node] = task.remote(self._scout, cores)
        ready, _ = ray.wait([self._sent[node]], timeout=0)
        if not ready:
            return None
        try:
            self._facts[node] = ray.get(ready[0])
        except RayError as error:  # its node is lost, or nothing can be measured there
            LOG.warning("node %s: its devices could not be measured: %s", node, str(error).partition("\n")[0])
            self._facts[node] = NodeFacts()
        return self._facts[node]
