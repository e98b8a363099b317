"""The one long-lived Train run of a pack, with a worker for each of its devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

import ray
from ray._private.state import state
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import RayTrainCallback  # type: ignore[attr-defined]
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from polygraft.cluster.actors.protocols import DEVICE
from polygraft.cluster.policy.devices import SHARE
from polygraft.grafts.runtime.process import device_environment
from polygraft.trainers.plan import PackPlan
from polygraft.trainers.starting import Starting

WAITING_S = 600  # for which a worker bears that another one, which answers Train, is not as far as itself
IMPORTS = 4  # times as long as one may be silent, workers that have room may import before they begin
NODE = "ray.io/node-id"  # Ray's label of a node
RESTARTS = 6  # of a pack's workers: a job that kills it is found out by the third death (`trainers/blame.py`)


def trainer(plan: PackPlan, storage: Path) -> DataParallelTrainer:
    """Its `fit` returns when the pack closed, and raises when its workers failed too often, or have no room."""
    on_gpus = plan.kind == "cuda"
    scaling = ScalingConfig(  # type: ignore[call-arg]  # checkers see Train v1's
        num_workers=len(plan.nodes),
        use_gpu=on_gpus,
        resources_per_worker={"CPU": 0, _resource(plan): SHARE},
        label_selector=[{NODE: node} for node in plan.nodes],
    )
    run = RunConfig(  # type: ignore[call-arg]
        name=plan.pack,
        storage_path=str(storage),
        failure_config=FailureConfig(  # type: ignore[call-arg]
            max_failures=RESTARTS,
            controller_failure_limit=0,  # no room, or a worker that cannot start: our controller tries again
        ),
        worker_runtime_env={"env_vars": device_environment(plan.cores)},
    )
    told = asdict(plan)
    if len(plan.nodes) == 1:
        # Not TorchTrainer: for its process group, of no use to one worker, torch listens on every interface.
        alone = DataParallelTrainer(_train, train_loop_config=told, scaling_config=scaling, run_config=run)
        return _watched(alone, plan)
    from ray.train.torch import TorchConfig, TorchTrainer  # which workers that are alone need not import

    group = TorchConfig(backend="nccl" if on_gpus else "gloo", timeout_s=WAITING_S)
    several = TorchTrainer(_train, train_loop_config=told, torch_config=group, scaling_config=scaling, run_config=run)
    return _watched(cast("DataParallelTrainer", several), plan)


def _train(plan: dict[str, object]) -> None:
    """Only the workers import torch, not the host that starts them."""
    from polygraft.trainers.loop import train_loop

    train_loop(plan)


def _watched(trainer: DataParallelTrainer, plan: PackPlan) -> DataParallelTrainer:
    """By what bounds its workers' start, in place of two processes: one would give back the pack's room, which the
    controller does (`cluster/actors/reservations.py`), one would read Ray's datasets, of which there is none."""
    all_of_them = trainer._create_default_callbacks

    def others() -> list[RayTrainCallback]:
        kept = [one for one in all_of_them() if not isinstance(one, PlacementGroupCleanerCallback | DatasetsCallback)]
        return [*kept, Starting(plan.placed_s + IMPORTS * plan.silent_s)]

    trainer._create_default_callbacks = others  # type: ignore[method-assign]
    return trainer


def _resource(plan: PackPlan) -> str:
    return "GPU" if plan.kind == "cuda" else DEVICE


def unplaced(error: Exception, plan: PackPlan) -> str | None:
    """What Ray lacks for the pack's processes, node by node, where the error says that it found no room for them."""
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
        nodes = {str(node["NodeID"]): node["Resources"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
        return wanting(plan, nodes, state.available_resources_per_node())  # type: ignore[no-untyped-call]
    return None


def wanting(plan: PackPlan, there: Mapping[str, Mapping[str, float]], free: Mapping[str, Mapping[str, float]]) -> str:
    """In words, from the resources of the nodes that are alive, and from what is free of them."""
    resource, said = _resource(plan), []
    for node in dict.fromkeys(plan.nodes):
        asked = SHARE * plan.nodes.count(node)
        if node not in there:
            said.append(f"node {node} is gone")
        else:
            has, left = there[node].get(resource, 0.0), free.get(node, {}).get(resource, 0.0)
            said.append(f"node {node} has {left:g} of {has:g} {resource} free, and {asked:g} is asked for")
    return f"Ray had no room for its processes within {plan.placed_s:g} s: {'; '.join(said)}"
