"""The service on a cluster: what the serveConfigV2 of a KubeRay RayService names is the ingress; the controller, which
building it starts, has the backbones deployed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing, suppress
from hashlib import sha256
from secrets import token_hex

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from polygraft.cluster.actors.effects import Means
from polygraft.cluster.actors.leader import Leader
from polygraft.cluster.actors.place import ON_HEAD
from polygraft.cluster.actors.watch import Watched
from polygraft.cluster.settings import BadSettings, Settings, load
from polygraft.cluster.store.connect import connect
from polygraft.launch.default_backbone import put_default
from polygraft.launch.engines import DeployBackbone
from polygraft.launch.first_key import admit_given_key
from polygraft.launch.measured import measured_devices
from polygraft.launch.packs import OpenHost
from polygraft.launch.scout import NodeScout
from polygraft.launch.search_desk import SearchDesk
from polygraft.launch.search_driver import SearchKeeper
from polygraft.launch.sizes import SizeBackbone
from polygraft.serving.ingress import IngressPlan, ingress_app

_LOG = logging.getLogger(__name__)
_CONTROLLER = "controller"
_SEARCHES = "searches"
_NAMESPACE = "polygraft"
_STOP_S = 10.0


def build(args: Mapping[str, object]) -> serve.Application:
    """Called by Serve on the cluster; `args` and the environment (POLYGRAFT_*) are the settings.

    There is no head process of ours on a cluster: the controller is an actor that outlives this call. Building again
    with the same settings finds it; with others it is replaced. While an upgrade runs two clusters over one store, the
    new one's controller waits until the old one's is gone. Raises BadSettings.
    """
    settings = load(**args)
    if settings.store_url == "embedded":
        raise BadSettings("store_url: embedded is for one machine; set POLYGRAFT_STORE_URL to redis://host:port/0")
    _admit_key(settings)
    cache = settings.data / "backbones"  # on the volume that every node mounts
    scout = NodeScout(settings.data / "speeds", gpus=settings.device != "cpu")
    put_default(settings, cache, measured_devices(scout))
    leader = _lead(settings, scout)
    _keep_searches(settings)
    watched = tuple(Watched(name, _NAMESPACE) for name in (leader, _SEARCHES))
    return ingress_app(IngressPlan(settings=settings, cache=cache, desk=SearchDesk(), watched=watched))


def _admit_key(settings: Settings) -> None:
    if settings.api_key_file is None:
        _LOG.warning("no api_key_file: only keys that the store has already open the API")
        return
    with closing(connect(settings.store_url)) as store:
        admit_given_key(store, settings.api_key_file)


def _lead(settings: Settings, scout: NodeScout) -> str:
    """This cluster's one controller, told these settings; its name."""
    means = Means(OpenHost.of(settings), DeployBackbone.of(settings), scout, SizeBackbone.of(settings))
    name = f"{_CONTROLLER}-{sha256(f'{means}'.encode()).hexdigest()[:12]}"
    for other in ray.util.list_named_actors(all_namespaces=True):
        if other["namespace"] == _NAMESPACE and other["name"].startswith(_CONTROLLER) and other["name"] != name:
            _end(ray.get_actor(other["name"], namespace=_NAMESPACE))
    options = ray.remote(Leader).options(
        name=name,
        namespace=_NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        resources=ON_HEAD,
        max_restarts=-1,
        max_concurrency=4,
    )
    options.remote(settings.store_url, settings.pack_limits, means, holder=f"{name}-{token_hex(4)}")
    return name


def _keep_searches(settings: Settings) -> None:
    """The cluster's one keeper of searches."""
    options = ray.remote(SearchKeeper).options(
        name=_SEARCHES,
        namespace=_NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        resources=ON_HEAD,
        max_restarts=-1,
    )
    options.remote(settings.told, f"http://127.0.0.1:{settings.port}")


def _end(leader: ActorHandle[Leader]) -> None:
    """Have it give up the lease, so that the next one need not wait until it runs out."""
    with suppress(GetTimeoutError, RayActorError):
        ray.get(leader.stop.remote(), timeout=_STOP_S)
    ray.kill(leader)
