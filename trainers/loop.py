"""The loop that Ray Train starts on the workers of a pack (`trainers/host.py`)."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from ray.train import get_context, report

from polygraft.cluster.actors.place import place
from polygraft.cluster.folders import Folders
from polygraft.cluster.leasing import lease_for_pack
from polygraft.cluster.model import PackId
from polygraft.cluster.store.base import Store
from polygraft.cluster.store.connect import connect
from polygraft.grafts.runtime.backbone import Backbone, best_dtype
from polygraft.grafts.runtime.process import chosen_device, lean_imports, settle
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers.leading import Beat, Close, LeadingRunner, follow
from polygraft.trainers.plan import PackPlan
from polygraft.trainers.ranks import Alone, ProcessGroup, Ranks
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.worker import PackWorker

REPORT_S = 5.0
DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}


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
        settle()
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
