"""Where a process of a device runs, and what it asks Ray for to get there. Ray only finds the node, and on it a GPU;
what may be used is leased (`cluster/leasing.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME

from polygraft.cluster.actors.protocols import DEVICE
from polygraft.cluster.model import DeviceKind

# Where Serve's controller is. The head is the only node that is never drained, and one that Serve's proxy always
# listens on; an actor without it is started again on any node, which Ray then never lets go.
ON_HEAD = {HEAD_NODE_RESOURCE_NAME: 0.001}


@dataclass(frozen=True, slots=True)
class Place:
    """The node of this process, and the GPU there that Ray assigned to it, by which it is the only one that torch
    sees; None on a CPU."""

    node: str
    index: int | None


def place() -> Place:
    """Of the actor or task that calls it."""
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    return Place(str(context.get_node_id()), int(gpus[0]) if gpus else None)


def asking(kind: DeviceKind, share: float) -> dict[str, object]:
    """Options of an actor that computes on such a share of a device. CPUs are not asked for: Ray's default of one an
    actor would starve a small machine, and halve its threads."""
    if kind == "cuda":
        return {"num_cpus": 0, "num_gpus": share}
    return {"num_cpus": 0, "resources": {DEVICE: share}}
