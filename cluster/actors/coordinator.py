"""Ray's coordinator of autoscaling, an actor that the first Train run starts on its own node, for ever. To Ray a node
with an actor is never idle: one that drains would stay, and so would one that the autoscaler should take away."""

from __future__ import annotations

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def keep_coordinator_here() -> None:
    """Start it on this process's node, unless there is one; returns at once."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    _start.options(scheduling_strategy=here).remote()


@ray.remote(num_cpus=0, max_calls=1)
def _start() -> None:
    """In a process of its own, which ends with it, for what it imports."""
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    get_or_create_autoscaling_coordinator()  # type: ignore[no-untyped-call]
