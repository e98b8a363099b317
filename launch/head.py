"""The head process: Ray, the HTTP service and the controller of one machine, from start to a clean end on SIGTERM.

Run by the supervisor as `python -m polygraft.launch.head SETTINGS.json SCRATCH`. Ray's own processes are its
children; its namespace is new each time, since the store is the truth.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from secrets import token_hex
from typing import cast

from polygraft.cluster.api_keys import create_key, verify_key
from polygraft.cluster.model import TenantId
from polygraft.cluster.service import Service, announce, write_private
from polygraft.cluster.settings import Settings
from polygraft.cluster.store.base import Store
from polygraft.cluster.store.connect import connect
from polygraft.launch.cache import backbone_cache
from polygraft.launch.local_ray import DEVICE, environment, start_ray
from polygraft.launch.processes import Identity
from polygraft.launch.run_folder import RunFolder

_LOG = logging.getLogger(__name__)
LOCAL = TenantId("local")
_LOOK_S = 2.0


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = Settings.model_validate_json(Path(sys.argv[1]).read_text())
    folder = RunFolder(settings.home)
    os.environ.update(environment(folder.ray_token))
    store = connect(settings.store_url)
    make_local_key(store, settings)
    store.close()
    _serve(settings, folder, Path(sys.argv[2]))
    return 0


def _serve(settings: Settings, folder: RunFolder, scratch: Path) -> None:
    """Everything that runs under Ray, until SIGTERM or the end of the supervisor."""
    supervisor = Identity.of(os.getppid())
    folder.enter("starting Ray")
    import ray
    from ray import serve
    from ray.actor import ActorHandle

    from polygraft.cluster.actors.leader import start_leader
    from polygraft.launch.packs import OpenHost
    from polygraft.launch.reservations import Reservations

    namespace = f"polygraft-{token_hex(4)}"
    address = start_ray(scratch, namespace)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # only now, since Ray sets handlers of its own
        signal.signal(number, lambda *_: stop.set())
    try:
        folder.enter(f"preparing the backbone {settings.backbone}")
        deployer = cast(ActorHandle[_Deployer], ray.remote(_Deployer).options(num_cpus=0).remote())
        prepared: ray.ObjectRef[Path] = deployer.prepare.remote(settings.backbone, backbone_cache())
        serve.start(http_options={"host": settings.host, "port": settings.port})  # meanwhile: both mostly wait
        backbone = ray.get(prepared)
        folder.enter("starting the controller")
        leader = start_leader(
            settings.store_url, settings.pack_limits, OpenHost.of(settings, backbone), name="controller"
        )
        folder.enter("starting the HTTP service and loading the backbone")
        ray.get(deployer.deploy.remote(settings, backbone))
        ray.kill(deployer)
        ray.get(leader.check.remote())
        service = Service(
            url=f"http://{_reachable(settings.host)}:{settings.port}",
            backbone=settings.backbone,
            backbone_folder=str(backbone),
            store_url=settings.store_url,
            ray_address=address,
            ray_namespace=namespace,
            ray_token=str(folder.ray_token),
            pid=supervisor.pid,
            started=supervisor.started,
        )
        announce(settings.service_path, service)
        folder.enter("ready")
        _LOG.info("ready at %s", service.url)
        reservations = Reservations(DEVICE)
        while not stop.wait(_LOOK_S):
            reservations.release(time.monotonic())
            if not supervisor.alive():
                _LOG.error("the supervisor is gone; ending")
                break
        folder.enter("stopping")
        serve.shutdown()
        ray.get(leader.stop.remote(), timeout=10)
    finally:
        ray.shutdown()


def make_local_key(store: Store, settings: Settings) -> None:
    """The local tenant's API key: made by the first start, made anew if the store does not know it."""
    path = settings.api_key_path
    if path.exists() and verify_key(store, path.read_text().strip()):
        return
    _, text = create_key(store, tenant=LOCAL, name="made by polygraft up", at=time.time())
    write_private(path, text + "\n")


class _Deployer:
    """Does what needs torch in a process of its own, which takes torch away when it ends."""

    def prepare(self, backbone: str, cache: Path) -> Path:
        """The backbone's folder, made where it is not there yet."""
        from polygraft.grafts.runtime.pretrained import materialise

        return materialise(backbone, cache)

    def deploy(self, settings: Settings, backbone_folder: Path) -> None:
        """Run the Serve application; returns when its replicas are up."""
        from ray import serve

        from polygraft.launch.serve_app import application

        serve.run(application(settings, backbone_folder), name="polygraft", route_prefix="/")


def _reachable(host: str) -> str:
    """An address a client on this machine can use."""
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host


if __name__ == "__main__":
    sys.exit(main())
