"""The process that holds a replica's engine: an actor of its own, which ingresses find by its name.

Nothing heavy is imported before the actor is made, since who makes it only watches it.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from polygraft.cluster.model import Backbone, GraftId, ReplicaId
from polygraft.cluster.settings import ServeSettings
from polygraft.grafts.runtime.process import chosen_device, in_own_thread, lean_imports, settle
from polygraft.serving.channel import Address, Channel

if TYPE_CHECKING:
    from polygraft.serving.engine import Engine
    from polygraft.serving.local import LocalLink

NAMESPACE = "polygraft-replicas"  # of Ray's, in which replicas have their ids for names
STALL_S = 60.0  # a step takes well below a second; an engine this late hangs


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """What a replica is told."""

    backbone: Backbone
    store_url: str
    data: Path
    device: str
    settings: ServeSettings
    step_floor_s: float


class Host:
    """Its event loop only passes messages; all computing is in the engine's thread. Calls wait until it has one."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._link: LocalLink | None = None
        self._address: Address | None = None
        self._loaded = asyncio.Event()  # not a future, which a caller that is cancelled would take with it

    async def load(self, plan: ReplicaPlan, replica: ReplicaId, cores: int) -> None:
        """Make the engine, on so many cores. Once."""
        engine = await asyncio.to_thread(_made, plan, replica, cores)  # the loop answers meanwhile
        from ray.util import get_node_ip_address

        from polygraft.serving.local import LocalLink

        engine.start()
        self._engine, self._link = engine, LocalLink(engine, silent_s=plan.settings.silent_s)
        self._address = await Channel(self._link).open(get_node_ip_address())  # type: ignore[no-untyped-call]
        self._loaded.set()

    async def warm(self, graft: GraftId) -> None:
        await (await self._there()).warm(graft)

    async def attend(self, ingress: str) -> None:
        if self._link is not None:
            await self._link.attend(ingress)

    async def address(self) -> Address:
        """Where it is asked, and its messages are heard."""
        await self._there()
        assert self._address is not None
        return self._address

    async def check(self) -> int:
        """The process, which may be loading yet. Raises when the engine's thread is dead or stuck."""
        if self._engine is not None and not self._engine.healthy(STALL_S):
            raise RuntimeError("the engine has stopped, or hangs in a step")
        return os.getpid()

    async def drain(self, patience_s: float) -> None:
        """Return when every stream is handed on, or `patience_s` seconds have passed; the engine is over then."""
        if self._engine is not None and self._link is not None:
            await self._link.drain(patience_s)
            await asyncio.to_thread(self._engine.stop)

    async def _there(self) -> LocalLink:
        await self._loaded.wait()
        assert self._link is not None
        return self._link


def _made(plan: ReplicaPlan, replica: ReplicaId, cores: int) -> Engine:
    """What takes long: imports, too."""
    import torch

    import polygraft.serving.local  # noqa: F401  # the loop needs it next

    torch.set_num_threads(cores)
    engine = in_own_thread(partial(_engine, plan, replica))
    settle()
    return engine


def _engine(plan: ReplicaPlan, replica: ReplicaId) -> Engine:
    import torch

    from polygraft.grafts.runtime.backbone import Backbone as Loaded
    from polygraft.serving.engine import Engine

    dtypes = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}
    record = plan.backbone
    with lean_imports():
        backbone = Loaded.load(
            Path(record.folder), dtypes[record.dtype], quantise=record.quantise, device=chosen_device(plan.device)
        )
    return Engine(
        backbone,
        plan.settings,
        replica=replica,
        data=plan.data,
        graft_bytes=plan.settings.graft_bytes,
        step_floor_s=plan.step_floor_s,
    )
