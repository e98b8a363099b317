"""The service as a Ray Serve application: for the head of one machine, and for the serveConfigV2 of a KubeRay
RayService."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ray
from ray import serve

from polygraft.cluster.actors.leader import Leader
from polygraft.cluster.settings import BadSettings, Settings, load
from polygraft.grafts.runtime.pretrained import materialise
from polygraft.launch.packs import OpenHost

_CONTROLLER = "controller"
_NAMESPACE = "polygraft"


def application(settings: Settings, backbone_folder: Path) -> serve.Application:
    """What `serve.run` takes; `settings.store_url` is that of a running server."""
    from polygraft.serving.app import build as build_app

    return build_app(settings, backbone_folder=backbone_folder)


def build(args: Mapping[str, object]) -> serve.Application:
    """Called by Serve on the cluster; `args` and the environment (POLYGRAFT_*) are the settings.

    There is no head process of ours on a cluster: the controller is an actor that outlives this call, and a second
    deployment of the same cluster takes its place by the store's lease. Raises BadSettings.
    """
    settings = load(**args)
    if settings.store_url == "embedded":
        raise BadSettings("store_url: embedded is for one machine; set POLYGRAFT_STORE_URL to redis://host:port/0")
    folder = materialise(settings.backbone, settings.data / "backbones")  # on the volume that every node mounts
    options = ray.remote(Leader).options(
        name=_CONTROLLER,
        namespace=_NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=4,
    )
    options.remote(settings.store_url, settings.pack_limits, OpenHost.of(settings, folder))
    return application(settings, folder)
