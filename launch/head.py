"""The head process: Ray, the HTTP service and the controller of one machine, from start to a clean end on SIGTERM.

Run by the supervisor as `python -m polygraft.launch.head SETTINGS.json SCRATCH`. Ray's own processes are its
children; its namespace is new each time, since the store is the truth.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, cast

from polygraft.cluster.model import Backbone
from polygraft.cluster.service import Service, announce
from polygraft.cluster.settings import Settings
from polygraft.cluster.store.connect import connect
from polygraft.kernels.common.room import when_there_is_room
from polygraft.launch.cache import backbone_cache, speed_cache
from polygraft.launch.first_key import admit_given_key, make_local_key
from polygraft.launch.local_ray import environment, start_ray
from polygraft.launch.machine import Machine
from polygraft.launch.processes import Identity
from polygraft.launch.run_folder import RunFolder
from polygraft.serving.http.listener import Listener

if TYPE_CHECKING:  # it imports Ray, which reads its environment then
    from polygraft.launch.scout import NodeScout

_LOG = logging.getLogger(__name__)
_LOOK_S = 0.5
_LOADING_S = 0.2
_RAISED = re.compile(r"((?:\w+\.)*)\w*(?:Error|Exception|Unavailable|DoesNotFit)\b.*: ")  # the last line of a traceback


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = Settings.model_validate_json(Path(sys.argv[1]).read_text())
    folder = RunFolder(settings.home)
    os.environ.update(environment(folder.ray_token))
    try:
        store = connect(settings.store_url)
        make_local_key(store, settings.api_key_path)
        if settings.api_key_file is not None:
            admit_given_key(store, settings.api_key_file)
        store.close()
        _serve(settings, folder, Path(sys.argv[2]))
    except Exception as error:
        _LOG.exception("the head fails")
        folder.fail(reason_of(error))
        return 1
    return 0


def _serve(settings: Settings, folder: RunFolder, scratch: Path) -> None:
    """Everything that runs under Ray, until SIGTERM or the end of the supervisor."""
    supervisor = Identity.of(os.getppid())
    folder.enter("starting Ray")
    import ray
    from ray import serve
    from ray.actor import ActorHandle

    from polygraft.cluster.actors.applications import application_name
    from polygraft.cluster.actors.effects import Means
    from polygraft.cluster.actors.leader import start_leader
    from polygraft.cluster.actors.watch import Watched
    from polygraft.launch.engines import DeployBackbone
    from polygraft.launch.packs import OpenHost
    from polygraft.launch.scout import NodeScout
    from polygraft.launch.search_desk import SearchDesk
    from polygraft.launch.search_driver import keeper_of, look
    from polygraft.launch.sizes import SizeBackbone
    from polygraft.serving.ingress import IngressPlan, ingress_app

    namespace = f"polygraft-{token_hex(4)}"
    machine = Machine.here(settings)
    address = start_ray(scratch, namespace, machine, machine.devices(settings.devices))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # only now, since Ray sets handlers of its own
        signal.signal(number, lambda *_: stop.set())
    try:
        folder.enter(f"preparing the backbone {settings.backbone}")
        preparer = cast(ActorHandle[_Preparer], ray.remote(_Preparer).options(num_cpus=0).remote())
        scout = NodeScout(speed_cache(), gpus=machine.gpus > 0)
        prepared: ray.ObjectRef[Backbone] = preparer.prepare.remote(settings, backbone_cache(), scout)
        http = {"host": settings.host, "port": settings.port}  # for Serve to tell of, as nothing of its own listens
        serve.start(proxy_location="Disabled", http_options=http)  # meanwhile: both mostly wait
        backbone = ray.get(prepared)
        ray.kill(preparer)
        folder.enter("starting the controller")
        means = Means(OpenHost.of(settings), DeployBackbone.of(settings), scout, SizeBackbone.of(settings))
        leader = start_leader(settings.store_url, settings.pack_limits, means, name="controller")
        folder.enter("starting the HTTP service and loading the backbone")
        watched = (Watched("controller", namespace),)
        door = scratch / "door"
        listener = Listener(settings.host, settings.port, door)
        plan = IngressPlan(settings=settings, cache=backbone_cache(), door=door, desk=SearchDesk(), watched=watched)
        serve.run(ingress_app(plan), name="polygraft")
        if not _loaded(application_name(settings.backbone), stop, supervisor):
            return
        ray.get(leader.check.remote())
        service = Service(
            url=f"http://{_reachable(settings.host)}:{settings.port}",
            backbone=settings.backbone,
            backbone_folder=backbone.folder,
            store_url=settings.store_url,
            ray_address=address,
            ray_namespace=namespace,
            ray_token=str(folder.ray_token),
            pid=supervisor.pid,
            started=supervisor.started,
        )
        when_there_is_room(lambda: announce(settings.service_path, service), told=_LOG.warning)
        folder.enter("ready")
        _LOG.info("ready at %s", service.url)
        keeper = keeper_of(settings, service.url)
        while not stop.wait(_LOOK_S):
            look(keeper)
            if not supervisor.alive():
                _LOG.error("the supervisor is gone; ending")
                break
        folder.enter("stopping")
        keeper.stop()
        stopping = leader.stop.remote()  # packs put their jobs down while replicas end
        listener.close()
        serve.shutdown()
        ray.get(stopping, timeout=12)
    finally:
        ray.shutdown()


def reason_of(error: BaseException) -> str:
    """One line for a person. Ray and Serve quote the traceback of another process, whose end says what it was about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    quoted = [line.removeprefix(found[1]) for line in lines if (found := _RAISED.match(line))]
    return quoted[-1] if quoted else f"{type(error).__name__}: {lines[0] if lines else 'without words'}"


def _loaded(application: str, stop: threading.Event, supervisor: Identity) -> bool:
    """Wait until the controller has had the application deployed and its replicas are up; False where the head is to
    end before. One that goes again meanwhile, since loading takes longer than `unload_s` and nobody asks, is loaded
    when somebody does. Raises RuntimeError with Serve's words where they cannot be up."""
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    there = False
    while supervisor.alive() and not stop.wait(_LOADING_S):
        found = serve.status().applications.get(application)
        if found is None and not there:
            continue
        if found is None or found.status is ApplicationStatus.DELETING:
            _LOG.warning("%s was unloaded while it was loading: nobody has asked for it", application)
            return True
        there = True
        if found.status is ApplicationStatus.RUNNING:
            return True
        if found.status not in (ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOYING):
            raise RuntimeError("\n".join([found.message, *(each.message for each in found.deployments.values())]))
    return False


class _Preparer:
    """Does what needs torch in a process of its own, which takes torch away when it ends."""

    def prepare(self, settings: Settings, cache: Path, scout: NodeScout) -> Backbone:
        """The default backbone, its folder made where it is not there yet."""
        from polygraft.launch.default_backbone import put_default
        from polygraft.launch.measured import measured_devices

        return put_default(settings, cache, measured_devices(scout))


def _reachable(host: str) -> str:
    """An address a client on this machine can use."""
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host


if __name__ == "__main__":
    sys.exit(main())
