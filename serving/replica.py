"""A replica as Ray Serve's: it starts the engine's process, watches it, starts another one where it dies, and has it
hand on its streams when Serve lets it go. Which of them it lets go is Serve's choice; that none of their streams is cut
makes it ours no matter.

No request goes through Serve's replica. So Serve counts none, and calls `__del__` as soon as it has chosen: that is how
a replica learns that it is to drain.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from contextlib import suppress
from functools import partial
from typing import NoReturn, cast

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from polygraft.cluster.actors.applications import ENGINE
from polygraft.cluster.actors.place import Place, asking, place
from polygraft.cluster.leasing import close_replica, open_replica
from polygraft.cluster.model import DeviceKind, ReplicaId
from polygraft.cluster.policy.devices import SHARE, sized_bytes, taken_bytes
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import StoreError
from polygraft.cluster.store.connect import connect
from polygraft.cluster.store.url import StoreUrl
from polygraft.grafts.runtime.process import device_environment
from polygraft.serving.host import NAMESPACE, Host, ReplicaPlan

SCALER = "polygraft.cluster.actors.scaler:Scaler"
MOST = 1000  # replicas, where only the devices say how many there may be
_END_S = 5.0  # for what comes after a drain
_SEEN_S = 1.0  # until ingresses see that it died, which is otherwise than that it is not wanted any more
_LOADING_S = 120.0  # a process that imports and reads may not answer for a while
_LIVED_S = 30.0  # a second process that dies sooner is left to Serve, whose pauses grow
_LOG = logging.getLogger(__name__)


class Replica:
    """Serve's event loop only watches and waits."""

    def __init__(self, plan: ReplicaPlan) -> None:
        """Raises LeaseRefused where the device has no room, and what making the engine raises: Serve tries again."""
        context = serve.get_replica_context()
        self._plan = plan
        self._name = f"{context.app_name}-{context.replica_id.unique_id}"
        self._id = ReplicaId(self._name)
        self._store = connect(plan.store_url)
        self._place = place()
        self._again: asyncio.Task[None] | None = None
        self._goes = False
        self._engines = 0
        self._start()
        try:
            self._open()
        except BaseException:
            self._close()
            raise

    async def check_health(self) -> None:
        """Raises when the engine's thread is dead or stuck, so that Serve starts another replica. Serve waits for three
        such failures. Where the engine's process is dead, or does not answer, another one takes its place, sooner than
        Serve would see to it; where that fails this one ends, which Serve sees at once."""
        if self._goes or (self._again is not None and not self._again.done()):
            return
        try:
            async with asyncio.timeout(self._plan.settings.silent_s):
                await self._host.check.remote()
        except (RayActorError, TimeoutError) as error:
            _LOG.error("replica %s: its engine's process is gone or does not answer: %r", self._id, error)
            self._again = asyncio.create_task(asyncio.to_thread(self._replace))

    async def __del__(self) -> None:
        self._goes = True
        if host := getattr(self, "_host", None):
            with suppress(RayError):
                await host.drain.remote(self._plan.settings.drain_s)
            await asyncio.to_thread(self._close)

    def _cores(self, node: str) -> int:
        """Of a device of the node; which one it will be is not known yet."""
        return min((one.value.device.cores for one in self._store.scan(keys.devices_of(node))), default=1)

    def _start(self) -> None:
        """A process for an engine, under an id of its own: ingresses never take it for the one before."""
        self._id = ReplicaId(f"{self._name}-{self._engines}" if self._engines else self._name)
        self._engines += 1
        self._host = _start(self._id, self._place, self._cores(self._place.node))

    def _open(self) -> None:
        """Return when the engine is there. Raises LeaseRefused, what making the engine raises, and GetTimeoutError
        where its process does not answer."""
        _, device = open_replica(
            self._store,
            self._id,
            backbone=self._plan.backbone.name,
            bytes_of=partial(taken_bytes, "serve", self._plan.backbone),
            actor=self._id,
            node=self._place.node,
            index=self._place.index,
            at=time.time(),
        )
        self._opened_at = time.monotonic()
        self._pid: int = ray.get(self._host.check.remote(), timeout=_LOADING_S)  # type: ignore[assignment]  # awaited
        loading = self._host.load.remote(self._plan, self._id, device.cores)
        while not ray.wait([loading], timeout=_LOADING_S)[0]:
            ray.get(self._host.check.remote(), timeout=_LOADING_S)
        ray.get(loading)

    def _replace(self) -> None:
        """The engine's process, which may be stopped: one that went on later would answer for a replica that is
        closed."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        if self._engines > 1 and time.monotonic() - self._opened_at < _LIVED_S:
            self._end("its engine died again, and soon")
        try:
            died, host = self._id, self._host
            self._start()  # it imports meanwhile
            time.sleep(_SEEN_S)
            self._close_one(died, host)
            self._open()
        except Exception as error:
            self._end(f"{type(error).__name__}: {error}")

    def _end(self, why: str) -> NoReturn:
        _LOG.error("replica %s ends: %s", self._id, why)
        time.sleep(_SEEN_S)
        try:
            self._close()
        finally:
            os._exit(1)

    def _close(self) -> None:
        self._close_one(self._id, self._host)
        self._store.close()

    def _close_one(self, replica: ReplicaId, host: ActorHandle[Host]) -> None:
        with suppress(StoreError):  # the controller sees that its actor is gone
            close_replica(self._store, replica, at=time.time())
        ray.kill(host)


def _start(replica: ReplicaId, here: Place, cores: int) -> ActorHandle[Host]:
    """In the place that this process has asked Ray for. It ends with this process."""
    gpu = {} if here.index is None else {"CUDA_VISIBLE_DEVICES": str(here.index)}
    options = ray.remote(Host).options(
        name=replica,
        namespace=NAMESPACE,
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(here.node, soft=False),
        runtime_env={"env_vars": {**device_environment(cores), **gpu}},
    )
    return cast(ActorHandle[Host], options.remote())


def replica_app(plan: ReplicaPlan, *, kind: DeviceKind, scaler: str = SCALER) -> serve.Application:
    """The deployment of a backbone's replicas on devices of a kind, whose number `scaler` says."""
    settings = plan.settings
    most = settings.max_replicas or MOST
    scaling = {
        "holds": settings.max_streams,
        "least": settings.min_replicas,
        "most": settings.max_replicas,
        "calm_s": settings.calm_s,
        "idle_s": settings.idle_s,
    }
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function=scaler,
        policy_kwargs={
            "store_url": StoreUrl(plan.store_url),
            "backbone": plan.backbone.name,
            "share": SHARE,
            "scaling": scaling,
            **({} if (sized := sized_bytes("serve", plan.backbone)) is None else {"bytes_": sized}),
        },
    )
    deployment = serve.deployment(
        Replica,
        name=ENGINE,
        # `initial_replicas` stays unset: it would be taken again whenever the config changes. The policy knows delays.
        autoscaling_config=AutoscalingConfig(
            min_replicas=0 if settings.idle_s is not None else settings.min_replicas,
            max_replicas=most,
            upscale_delay_s=0,
            downscale_delay_s=0,
            downscale_to_zero_delay_s=0,
            policy=policy,
        ),
        health_check_period_s=1,  # a replica that died is replaced when the next check fails
        health_check_timeout_s=settings.silent_s + _END_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=settings.drain_s + _END_S,
        ray_actor_options=asking(kind, SHARE),
    )
    return cast(serve.Deployment, deployment).bind(plan)
