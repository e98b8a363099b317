"""The service as Ray Serve applications: the ingress, and the replicas of each backbone."""

from __future__ import annotations

from pathlib import Path

from ray import serve

from polygraft.cluster.actors.applications import application_name
from polygraft.cluster.model import Backbone, ReplicaId
from polygraft.cluster.settings import Settings
from polygraft.serving.replica import ReplicaPlan, replica_app


def engine_app(settings: Settings, backbone: Backbone) -> serve.Application:
    """The replicas of a backbone, to run under its `application_name`; its folder is visible on every node."""
    plan = ReplicaPlan(
        replica=ReplicaId(f"{application_name(backbone.name)}-0"),
        backbone_folder=Path(backbone.folder),
        data=settings.data,
        device=settings.device,
        dtype=backbone.dtype,
        quantise=backbone.quantise,
        settings=settings.serve,
    )
    return replica_app(plan)
