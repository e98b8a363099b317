"""The replicas of a backbone as a Ray Serve application."""

from __future__ import annotations

import ray
from ray import serve

from polygraft.cluster.model import Backbone, DeviceKind
from polygraft.cluster.settings import Settings
from polygraft.cluster.sizing import fitted
from polygraft.serving.host import ReplicaPlan
from polygraft.serving.replica import SCALER, replica_app


def engine_app(settings: Settings, backbone: Backbone, *, scaler: str = SCALER) -> serve.Application:
    """To run under the backbone's `application_name`. `settings.store_url` is a running server's, and the backbone's
    folder visible on every node; `scaler` is the policy class that says how many replicas there are."""
    settings = fitted(settings, backbone)
    plan = ReplicaPlan(
        backbone=backbone,
        store_url=settings.store_url,
        data=settings.data,
        device=settings.device,
        settings=settings.serve,
        step_floor_s=settings.step_floor_s,
    )
    return replica_app(plan, kind=_kind(settings), scaler=scaler)


def _kind(settings: Settings) -> DeviceKind:
    """Of the devices that are asked for: GPUs where Ray has any."""
    if settings.device != "auto":
        return settings.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"  # type: ignore[no-untyped-call]
