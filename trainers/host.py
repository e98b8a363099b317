"""The pack under Ray Train: an actor whose `run` is one long-lived Train run with a worker for each of the pack's
devices, and the loop that Train starts on them."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import ray
import torch
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context, report
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from polygraft.cluster.actors.place import place
from polygraft.cluster.actors.protocols import DEVICE, PackDied
from polygraft.cluster.folders import Folders
from polygraft.cluster.leasing import lease_for_pack
from polygraft.cluster.model import DeviceKind, JobId, PackId
from polygraft.cluster.policy.devices import SHARE
from polygraft.cluster.store.base import Store
from polygraft.cluster.store.connect import connect
from polygraft.grafts.runtime.backbone import Backbone, best_dtype
from polygraft.grafts.runtime.pretrained import Quantise
from polygraft.grafts.runtime.process import chosen_device, device_environment, lean_imports
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.kernels.common.atomic import whole_file
from polygraft.kernels.common.room import when_there_is_room
from polygraft.trainers.leading import Beat, Close, LeadingRunner, follow
from polygraft.trainers.manifest import Manifest
from polygraft.trainers.ranks import Alone, ProcessGroup, Ranks
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.underway import Underway
from polygraft.trainers.worker import PackWorker

_LOG = logging.getLogger(__name__)
REPORT_S = 5.0
WAITING_S = 600  # for which a worker bears that another one, which answers Train, is not as far as itself
NODE = "ray.io/node-id"  # Ray's label of a node
RESTARTS = 6  # of a pack's workers: a job that kills it is found out by the third death (`trainers/blame.py`)
_RUN_BYTES = 1 << 20
DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """What a pack's processes are told; plain values, since Train carries them to its workers. `nodes` are those of its
    devices, all of which are of one `kind` and have as many `cores`."""

    pack: str
    nodes: tuple[str, ...]
    kind: DeviceKind
    cores: int
    backbone_folder: str
    store_url: str
    data: str
    device: str = "auto"
    dtype: str = "auto"
    quantise: Quantise | None = None
    max_rows: int = 768
    micro_rows: int = 128
    max_bytes: int = 0  # of the jobs' state and one forward; 0 = as much as they take
    step_floor_s: float = 0.0
    silent_s: float = 30.0  # after which a worker that Train asks in vain is dead


class PackHost:
    """Body of the actor that owns one pack's Train run (start it with `start_host`). `run` returns when the pack
    closed and raises when its worker failed too often."""

    def __init__(self, plan: PackPlan) -> None:
        self._plan = plan

    def run(self) -> None:
        storage = Path(self._plan.data) / "train"
        when_there_is_room(lambda: _probe(storage), told=lambda error: _LOG.warning("%s: %s", storage, error))
        try:
            self._trainer(storage).fit()
        except Exception as error:
            suspects = suspected(Folders(Path(self._plan.data)).pack(PackId(self._plan.pack)))
            raise PackDied(f"{type(error).__name__}: {error}", suspects) from None

    def _trainer(self, storage: Path) -> DataParallelTrainer:
        plan, on_gpus = self._plan, self._plan.kind == "cuda"
        scaling = ScalingConfig(  # type: ignore[call-arg]  # checkers see Train v1's
            num_workers=len(plan.nodes),
            use_gpu=on_gpus,
            resources_per_worker={"CPU": 0, "GPU" if on_gpus else DEVICE: SHARE},
            label_selector=[{NODE: node} for node in plan.nodes],
        )
        run = RunConfig(  # type: ignore[call-arg]
            name=plan.pack,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=RESTARTS),
            worker_runtime_env={"env_vars": device_environment(plan.cores)},
        )
        told = asdict(plan)
        if len(plan.nodes) == 1:
            # Not TorchTrainer: for its process group, of no use to one worker, torch listens on every interface.
            return DataParallelTrainer(train_loop, train_loop_config=told, scaling_config=scaling, run_config=run)
        from ray.train.torch import TorchConfig, TorchTrainer  # which workers that are alone need not import

        group = TorchConfig(backend="nccl" if on_gpus else "gloo", timeout_s=WAITING_S)
        return cast(
            "DataParallelTrainer",
            TorchTrainer(
                train_loop, train_loop_config=told, torch_config=group, scaling_config=scaling, run_config=run
            ),
        )

    def ping(self) -> str:
        return self._plan.pack


def start_host(plan: PackPlan) -> ActorHandle[PackHost]:
    """The pack's host actor; it asks for no CPU, since its worker is what computes."""
    told = {
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{plan.silent_s}",
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


def train_loop(config: dict[str, object]) -> None:
    """What Ray Train runs on each worker, which leases its device first. Rank 0 rebuilds the pack from its manifest and
    steps until it is told to close; the others do as it says."""
    plan = PackPlan(**config)  # type: ignore[arg-type]
    context, here = get_context(), place()
    rank = context.get_world_rank()
    seats = [seat for seat, node in enumerate(plan.nodes) if node == here.node]  # Train numbers ranks as it likes
    store = connect(plan.store_url, patient=True)  # what it cannot record, for want of room, it waits for
    try:
        device = lease_for_pack(
            store,
            PackId(plan.pack),
            rank=seats[context.get_local_rank()],
            node=here.node,
            index=here.index,
            at=time.time(),
        )
        torch.set_num_threads(device.cores)
        ranks: Ranks = ProcessGroup() if len(plan.nodes) > 1 else Alone()
        backbone = _backbone(plan)
        kind = LeadingRunner if ranks.size > 1 and rank == 0 else PackRunner
        runner = kind(backbone, max_rows=plan.max_rows, max_bytes=plan.max_bytes or None, ranks=ranks)
        if rank:
            follow(runner, lambda: _report(runner))
        else:
            _lead(plan, runner, store)
    finally:
        store.close()


def _backbone(plan: PackPlan) -> Backbone:
    device = chosen_device(plan.device)
    dtype = DTYPES[plan.dtype] or best_dtype(device)
    with lean_imports():
        return Backbone.load(Path(plan.backbone_folder), dtype, training=True, quantise=plan.quantise, device=device)


def _lead(plan: PackPlan, runner: PackRunner, store: Store) -> None:
    worker = PackWorker(
        PackId(plan.pack),
        runner,
        Tokeniser.load(Path(plan.backbone_folder)),
        store,
        folders=Folders(Path(plan.data)),
        micro_rows=plan.micro_rows,
        step_floor_s=plan.step_floor_s,
    )
    reported = 0.0

    def heartbeat() -> None:
        nonlocal reported
        if time.monotonic() - reported > REPORT_S:
            reported = time.monotonic()
            runner.ranks.tell(Beat())
            _report(runner)

    worker.run(heartbeat)
    runner.ranks.tell(Close())


def _report(runner: PackRunner) -> None:
    """A barrier of all workers."""
    report({"steps": runner.steps, "jobs": len(runner.jobs)})
