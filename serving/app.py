"""The service as one Ray Serve application: an ingress over the replicas of a backbone."""

from __future__ import annotations

from pathlib import Path

from ray import serve

from polygraft.cluster.model import ReplicaId
from polygraft.cluster.settings import Settings
from polygraft.serving.http.context import NO_DESK, Desk
from polygraft.serving.ingress import IngressPlan, ingress_app
from polygraft.serving.replica import ReplicaPlan, replica_app


def build(settings: Settings, *, backbone_folder: Path, replicas: int = 1, desk: Desk = NO_DESK) -> serve.Application:
    """For `serve.run`. `settings.store_url` must be a running server's, `backbone_folder` visible on every node."""
    plans = [
        ReplicaPlan(
            replica=ReplicaId(f"replica-{index}"),
            backbone_folder=backbone_folder,
            data=settings.data,
            device=settings.device,
            dtype=settings.dtype,
            quantise=settings.quantise,
            settings=settings.serve,
        )
        for index in range(replicas)
    ]
    engines = {plan.replica: replica_app(plan) for plan in plans}
    return ingress_app(IngressPlan(settings=settings, backbone_folder=backbone_folder, desk=desk), engines)
