"""The HTTP API as a Ray Serve deployment: store, tokenizer and gateway, but no model and no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from uuid import uuid4

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from polygraft.cluster.model import ReplicaId, TenantId
from polygraft.cluster.settings import Settings
from polygraft.cluster.store.connect import connect
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.runtime.pretrained import fingerprint
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.serving.adoption import Adoption, ReaderPlan
from polygraft.serving.gateway import Gateway
from polygraft.serving.http.app import create_app
from polygraft.serving.http.context import NO_DESK, Api, Desk
from polygraft.serving.http.meters import Meters
from polygraft.serving.http.overview import Overview
from polygraft.serving.remote import ServeLink

_READER_COPIES = 8  # of a graft's bytes: as they lie in the file, in float32, turned, merged, and beside W


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressPlan:
    """What an ingress is told."""

    settings: Settings
    backbone_folder: Path
    desk: Desk = NO_DESK


class Ingress:
    """Answers HTTP; Serve builds the application after the constructor and runs its lifespan."""

    def __init__(self, plan: IngressPlan, replicas: Mapping[ReplicaId, DeploymentHandle[object]]) -> None:
        settings, folder = plan.settings, plan.backbone_folder
        links = {replica: ServeLink(handle) for replica, handle in replicas.items()}
        name, store = f"ingress-{uuid4().hex[:12]}", connect(settings.store_url)
        self._api = Api(
            store=store,
            gateway=Gateway(links, ingress=name, settings=settings.serve),
            tokeniser=Tokeniser.load(folder),
            shape=ModelShape.from_config(json.loads((folder / "config.json").read_text())),
            backbone=settings.backbone,
            fingerprint=fingerprint(folder, settings.quantise),
            stock=BackboneFiles(folder),
            quantised=settings.quantise is not None,
            data=settings.data,
            graft_roots=settings.graft_roots,
            adoption=Adoption(
                ReaderPlan(
                    backbone_folder=folder,
                    quantise=settings.quantise,
                    memory_bytes=_READER_COPIES * settings.limits.graft_bytes,
                    seconds=settings.limits.graft_s,
                )
            ),
            limits=settings.limits,
            pack=settings.pack_limits,
            max_context=settings.serve.max_context,
            clock=time.time,
            desk=plan.desk,
            meters=Meters(name),
            overview=Overview(store, time.time),
            metrics_tenants=frozenset(map(TenantId, settings.metrics_tenants)),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._api)

    async def check_health(self) -> None:
        """Answering is healthy: clients are told of a missing replica or store by 503; a restart would not help."""


def ingress_app(plan: IngressPlan, replicas: Mapping[ReplicaId, serve.Application]) -> serve.Application:
    """The deployment that HTTP requests reach."""
    deployment = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=10_000,  # what a tenant may hold of them is bounded in http/bodies.py and the engine
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=5,
        # Few heaps, so that what large bodies took can be handed back (http/bodies.py).
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": {"MALLOC_ARENA_MAX": "2"}}},
    )
    return cast(serve.Deployment, deployment).bind(plan, dict(replicas))
