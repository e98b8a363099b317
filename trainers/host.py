"""The pack under Ray Train: an actor whose `run` is one long-lived Train run, and the loop that Train starts on the
worker."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import ray
import torch
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig, report
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from polygraft.cluster.actors.protocols import PackDied
from polygraft.cluster.folders import Folders
from polygraft.cluster.model import JobId, PackId
from polygraft.cluster.store.connect import connect
from polygraft.grafts.runtime.backbone import Backbone, best_dtype
from polygraft.grafts.runtime.pretrained import Quantise
from polygraft.grafts.runtime.process import chosen_device, device_environment, lean_imports
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.kernels.common.atomic import whole_file
from polygraft.kernels.common.room import when_there_is_room
from polygraft.trainers.manifest import Manifest
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.underway import Underway
from polygraft.trainers.worker import PackWorker

_LOG = logging.getLogger(__name__)
SHARE = 0.5  # of a `device`; the other half serves
REPORT_S = 5.0
RESTARTS = 6  # of a pack's worker: a job that kills it is found out by the third death (`trainers/blame.py`)
_RUN_BYTES = 1 << 20
DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """What a pack's processes are told; plain values, since Train carries them to its worker."""

    pack: str
    backbone_folder: str
    store_url: str
    data: str
    device: str = "auto"
    dtype: str = "auto"
    quantise: Quantise | None = None
    max_rows: int = 768
    micro_rows: int = 128
    max_bytes: int = 0  # of the jobs' state and one forward; 0 = as much as they take


class PackHost:
    """Body of the actor that owns one pack's Train run (start it with `start_host`). `run` returns when the pack
    closed and raises when its worker failed too often."""

    def __init__(self, plan: PackPlan) -> None:
        self._plan = plan

    def run(self) -> None:
        storage = Path(self._plan.data) / "train"
        when_there_is_room(lambda: _probe(storage), told=lambda error: _LOG.warning("%s: %s", storage, error))
        # Not TorchTrainer: for its process group, of no use to one worker, torch listens on every interface.
        trainer = DataParallelTrainer(
            train_loop,
            train_loop_config=asdict(self._plan),
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0, "device": SHARE}),
            run_config=RunConfig(  # type: ignore[call-arg]  # checkers see Train v1's
                name=self._plan.pack,
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=RESTARTS),
                worker_runtime_env={"env_vars": device_environment()},
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            suspects = suspected(Folders(Path(self._plan.data)).pack(PackId(self._plan.pack)))
            raise PackDied(f"{type(error).__name__}: {error}", suspects) from None

    def ping(self) -> str:
        return self._plan.pack


def start_host(plan: PackPlan) -> ActorHandle[PackHost]:
    """The pack's host actor; it asks for no CPU, since its worker is what computes."""
    options = ray.remote(PackHost).options(num_cpus=0, max_concurrency=2)
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
    """What Ray Train runs on the worker: rebuild the pack from its manifest, then step until it is told to close."""
    plan = PackPlan(**config)  # type: ignore[arg-type]
    torch.set_num_threads(os.cpu_count() or 1)
    folder = Path(plan.backbone_folder)
    device = chosen_device(plan.device)
    dtype = DTYPES[plan.dtype] or best_dtype(device)
    with lean_imports():
        backbone = Backbone.load(folder, dtype, training=True, quantise=plan.quantise, device=device)
    runner = PackRunner(backbone, max_rows=plan.max_rows, max_bytes=plan.max_bytes or None)
    store = connect(plan.store_url, patient=True)  # what it cannot record, for want of room, it waits for
    worker = PackWorker(
        PackId(plan.pack),
        runner,
        Tokeniser.load(folder),
        store,
        folders=Folders(Path(plan.data)),
        micro_rows=plan.micro_rows,
    )
    reported = 0.0

    def heartbeat() -> None:
        nonlocal reported
        if time.monotonic() - reported > REPORT_S:
            reported = time.monotonic()
            report({"steps": runner.steps, "jobs": len(runner.jobs)})

    try:
        worker.run(heartbeat)
    finally:
        store.close()
