"""The engine as a Ray Serve deployment: one process, one backbone, one engine thread."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from ray import serve

from polygraft.cluster.model import GraftId, ReplicaId
from polygraft.cluster.settings import ServeSettings
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.pretrained import Quantise
from polygraft.grafts.runtime.process import chosen_device, device_environment, in_own_thread, lean_imports
from polygraft.serving.engine import Engine
from polygraft.serving.local import LocalLink
from polygraft.serving.messages import Draining, QueueFull, StepMessage
from polygraft.serving.sequence import GenerationRequest

SHARE = 0.5  # of a `device`; the other half trains
STALL_S = 60.0  # a step takes well below a second; an engine this late hangs
DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """What a replica is told."""

    replica: ReplicaId
    backbone_folder: Path
    data: Path
    device: str
    dtype: str
    quantise: Quantise | None
    settings: ServeSettings


class Replica:
    """Serve's event loop only passes messages; all computing is in the engine's thread."""

    def __init__(self, plan: ReplicaPlan) -> None:
        torch.set_num_threads(_cores())
        self._engine = in_own_thread(partial(_engine, plan))
        self._engine.start()
        self._link = LocalLink(self._engine)

    async def submit(self, request: GenerationRequest) -> QueueFull | Draining | None:
        return await self._link.submit(request)

    async def cancel(self, request: str) -> None:
        await self._link.cancel(request)

    async def warm(self, graft: GraftId) -> None:
        await self._link.warm(graft)

    async def messages(self, ingress: str) -> AsyncGenerator[StepMessage, None]:
        async for message in self._link.messages(ingress):
            yield message

    async def check_health(self) -> None:
        """Raises when the engine's thread is dead or stuck, so that Serve starts the replica anew."""
        if not self._engine.healthy(STALL_S):
            raise RuntimeError("the engine has stopped, or hangs in a step")

    async def __del__(self) -> None:
        if engine := getattr(self, "_engine", None):
            await asyncio.to_thread(engine.stop)


def _engine(plan: ReplicaPlan) -> Engine:
    device = chosen_device(plan.device)
    with lean_imports():
        backbone = Backbone.load(plan.backbone_folder, DTYPES[plan.dtype], quantise=plan.quantise, device=device)
    return Engine(backbone, plan.settings, replica=plan.replica, data=plan.data)


def replica_app(plan: ReplicaPlan) -> serve.Application:
    """One replica's deployment. Each has its own, so that whoever routes can name it and whoever scales picks it."""
    deployment = serve.deployment(
        Replica,
        name=plan.replica,
        num_replicas=1,
        max_ongoing_requests=10_000,  # every ingress holds one open; the engine bounds its own queue
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={
            "num_cpus": 0,
            "resources": {"device": SHARE},
            "runtime_env": {"env_vars": device_environment()},
        },
    )
    return cast(serve.Deployment, deployment).bind(plan)


def _cores() -> int:
    return os.cpu_count() or 1
