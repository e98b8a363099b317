"""The HTTP API as a Ray Serve deployment: store, tokenizers and gateways, but no model."""

from __future__ import annotations

import json
import time
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast
from uuid import uuid4

from fastapi import FastAPI
from ray import serve

from polygraft.cluster.actors.watch import Watch, Watched
from polygraft.cluster.model import Backbone, TenantId
from polygraft.cluster.settings import ServeSettings, Settings
from polygraft.cluster.sizing import fitted, sizes
from polygraft.cluster.store import keys
from polygraft.cluster.store.connect import connect
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.runtime.process import settle
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.serving.adoption import Adoption, ReaderPlan
from polygraft.serving.candidate import examined
from polygraft.serving.fleet import StoreFleet
from polygraft.serving.gateway import Gateway
from polygraft.serving.http.answering import answering
from polygraft.serving.http.app import create_app
from polygraft.serving.http.context import NO_DESK, Api, Desk
from polygraft.serving.http.known import Backbones, KnownBackbone
from polygraft.serving.http.meters import Meters
from polygraft.serving.http.overview import Overview
from polygraft.serving.remote import ActorLink

_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "2",  # few heaps, so that what large bodies took can be handed back (http/bodies.py)
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # else each token passes from one loop to another
}
_AFTER_S = 5.0  # for what comes after a drain
_READER_COPIES = 8  # of a graft's bytes: as they lie in the file, in float32, turned, merged, and beside W


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressPlan:
    """What an ingress is told; `cache` is where backbones lie that the service has fetched or converted, `watched` are
    the actors that it starts again when they do not answer. Clients reach it by the listener at `door`
    (http/listener.py), or, where that is None, through Serve's proxies."""

    settings: Settings
    cache: Path
    door: Path | None = None
    desk: Desk = NO_DESK
    watched: tuple[Watched, ...] = ()


class Ingress:
    """Answers HTTP; Serve builds the application after the constructor and runs its lifespan."""

    def __init__(self, plan: IngressPlan) -> None:
        settings = plan.settings
        self._settings = settings
        self._door = plan.door
        Watch(lambda: plan.watched).start()
        self._name = f"ingress-{uuid4().hex[:12]}"
        self._store = store = connect(settings.store_url)
        self._api = Api(
            store=store,
            backbones=Backbones(
                store,
                self._known,
                default=settings.backbone,
                unload_s=settings.unload_s,
                idle_s=settings.serve.idle_s,
            ),
            data=settings.data,
            graft_roots=settings.graft_roots,
            candidate=lambda source, quantise: examined(source, plan.cache, quantise),
            limits=settings.limits,
            pack=lambda record: fitted(settings, record).pack_limits,
            sized=self._sized,
            clock=time.time,
            desk=plan.desk,
            meters=Meters(self._name),
            overview=Overview(store, time.time),
            metrics_tenants=frozenset(map(TenantId, settings.metrics_tenants)),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(self._api, self._answering)
        settle()
        return app

    def _answering(self, app: FastAPI) -> AbstractAsyncContextManager[None]:
        if self._door is None:
            return nullcontext()
        return answering(app, self._door, drain_s=self._settings.serve.drain_s)

    async def check_health(self) -> None:
        """Answering is healthy: clients are told of a missing replica or store by 503; a restart would not help."""

    def _sized(self, record: Backbone) -> Backbone:
        """With the sizes for the devices that there are. Raises DoesNotFit."""
        devices = [found.value.device for found in self._store.scan(keys.DEVICES)]
        return replace(record, sizes=sizes(self._settings, record, devices))

    def _known(self, record: Backbone) -> KnownBackbone:
        settings, folder = fitted(self._settings, record), Path(record.folder)
        plan = ReaderPlan(
            backbone_folder=folder,
            quantise=record.quantise,
            memory_bytes=_READER_COPIES * settings.limits.graft_bytes,
            seconds=settings.limits.graft_s,
        )
        waits_s = settings.serve.wait_s
        fleet = StoreFleet(self._api.store, record.name, connect=ActorLink)
        return KnownBackbone(
            record=record,
            tokeniser=Tokeniser.load(folder),
            shape=ModelShape.from_config(json.loads((folder / "config.json").read_text())),
            files=BackboneFiles(folder),
            gateway=Gateway({}, ingress=self._name, settings=settings.serve, ready_s=waits_s, fleet=fleet),
            adoption=Adoption(plan),
            max_context=min(settings.serve.max_context, record.context_length or settings.serve.max_context),
        )


def _goes_s(serve: ServeSettings) -> float:
    """For the answers that it is giving, some of which may wait for a replica that loads: both are replaced at once
    where settings of both are others."""
    return serve.drain_s + serve.wait_s + _AFTER_S


def ingress_app(plan: IngressPlan) -> serve.Application:
    """The deployment that HTTP requests reach."""
    deployment = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=10_000,  # what a tenant may hold of them is bounded in http/bodies.py and the engine
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=_goes_s(plan.settings.serve),
        health_check_period_s=2,
        health_check_timeout_s=plan.settings.serve.silent_s,  # three times
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": _ENVIRONMENT}},
    )
    return cast(serve.Deployment, deployment).bind(plan)
