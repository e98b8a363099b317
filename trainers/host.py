"""The pack under Ray Train: an actor whose `run` is one long-lived Train run with a worker for each of the pack's
devices.

Nothing heavy is imported before `run` is called: whether it answers tells one that has no process yet from one that
imports.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from polygraft.cluster.actors.protocols import PackDied
from polygraft.cluster.folders import Folders
from polygraft.cluster.model import JobId, PackId
from polygraft.kernels.common.atomic import whole_file
from polygraft.kernels.common.room import when_there_is_room
from polygraft.trainers.manifest import Manifest
from polygraft.trainers.plan import PackPlan
from polygraft.trainers.underway import Underway

_LOG = logging.getLogger(__name__)
_RUN_BYTES = 1 << 20


class PackHost:
    """Body of the actor that owns one pack's Train run (start it with `start_host`). `run` returns when the pack
    closed and raises when its worker failed too often."""

    def __init__(self, plan: PackPlan) -> None:
        self._plan = plan

    def run(self) -> None:
        storage = Path(self._plan.data) / "train"
        when_there_is_room(lambda: _probe(storage), told=lambda error: _LOG.warning("%s: %s", storage, error))
        from polygraft.trainers.run import trainer, unplaced

        try:
            trainer(self._plan, storage).fit()
        except Exception as error:
            if why := unplaced(error, self._plan):
                raise PackDied(why, ()) from None
            suspects = suspected(Folders(Path(self._plan.data)).pack(PackId(self._plan.pack)))
            raise PackDied(f"{type(error).__name__}: {error}", suspects) from None

    def ping(self) -> str:
        return self._plan.pack


def start_host(plan: PackPlan) -> ActorHandle[PackHost]:
    """The pack's host actor; it asks for no CPU, since its worker is what computes."""
    told = {
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{plan.silent_s}",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{plan.placed_s}",
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the controller knows which nodes drain
    }
    options = ray.remote(PackHost).options(
        num_cpus=0,
        max_concurrency=2,
        runtime_env={"env_vars": told},  # which Train hands down to whoever watches the workers
        scheduling_strategy=NodeAffinitySchedulingStrategy(plan.nodes[0], soft=True),  # they end together
    )
    return cast("ActorHandle[PackHost]", options.remote(plan))


def suspected(folder: Path) -> frozenset[JobId]:
    """The jobs that the pack in `folder` may have died of: those of its last worker's death, too."""
    blame, guilty = Manifest.load(folder).blame, None
    underway = Underway(folder)
    if killed_at := underway.left():
        blame, guilty = blame.after_death(killed_at)
    underway.close()
    return frozenset(JobId(job) for job in (*blame.suspects(), guilty) if job is not None)


def _probe(folder: Path) -> None:
    """Raise OSError unless there is room for what Train writes to say that it begins."""
    with whole_file(folder / "room") as draft:
        draft.write_bytes(bytes(_RUN_BYTES))
