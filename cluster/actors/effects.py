"""Decisions become Ray calls, one host actor a pack. But for launch, only this file starts and ends Ray's processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.serve._private.common import ReplicaID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from polygraft.cluster.actors.applications import Applications, Deploy
from polygraft.cluster.actors.coordinator import keep_coordinator_here
from polygraft.cluster.actors.discovery import Discovery, Scout
from polygraft.cluster.actors.pings import EVERY_S, Pings, calling
from polygraft.cluster.actors.protocols import PackDied, PackEnd
from polygraft.cluster.actors.reservations import give_back
from polygraft.cluster.actors.watch import SILENT_S, Watch, Watched
from polygraft.cluster.model import Backbone, Device, JobId, Pack, PackId, Replica, ReplicaId
from polygraft.cluster.size import Size

LOG = logging.getLogger(__name__)
REPLICA_S = 120.0  # for a replica or an ingress to answer while it starts; Serve waits without a bound until it has
HOST_S = 60.0  # for a host's process to start, which imports nothing heavy before it answers
GIVE_BACK_S = 2.0  # how long a dead pack may keep its room from the next one
ACTORS_S = 2.0  # how long a list of actors is used


class PackHost(Protocol):
    """The actor that holds one pack."""

    def run(self) -> None:
        """Return when the pack is over, raise when it failed."""
        ...

    def ping(self) -> object:
        """Return at once, while `run` goes on."""
        ...


OpenHost = Callable[[Pack], ActorHandle[PackHost]]


SizeBackbone = Callable[[Backbone, Collection[Device]], tuple[Size, ...]]


@dataclass(frozen=True, slots=True)
class Means:
    """By what decisions are carried out; Ray must be able to carry it to the controller's process."""

    open_host: OpenHost
    deploy: Deploy
    scout: Scout | None = None
    size: SizeBackbone | None = None


class RayEffects:
    """Packs in the host actors that `open_host` makes, replicas in the applications that `deploy` makes.

    Hosts belong to the process that made them: Ray ends them with it, so a new controller finds no pack alive.
    """

    def __init__(self, means: Means) -> None:
        self._open_host = means.open_host
        self._applications = Applications(means.deploy)
        self._discovery = Discovery(means.scout)
        self._size = means.size
        self._coordinated = False
        self._hosts: dict[PackId, tuple[ActorHandle[PackHost], ray.ObjectRef[None]]] = {}
        self._pings: Pings[PackId] = Pings(SILENT_S, starting_s=HOST_S)
        self._serve_s_own = Watch(lambda: [Watched(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE, "check_alive")])
        self._replicas = Watch(_serve_s_replicas, silent_s=REPLICA_S, starting_s=REPLICA_S)
        self._looked_at = self._given_back_at = float("-inf")
        self._actors: Collection[str] = ()
        self._listed_at = float("-inf")

    def open_pack(self, pack: Pack) -> None:
        if not self._coordinated:
            self._coordinated = True
            keep_coordinator_here()
        host = self._open_host(pack)
        self._hosts[pack.id] = (host, host.run.remote())

    def close_pack(self, pack: PackId) -> None:
        found = self._hosts.pop(pack, None)
        if found is not None:
            ray.kill(found[0])

    def alive(self) -> Collection[PackId]:
        return self._hosts.keys()

    def ended(self) -> Sequence[PackEnd]:
        if time.monotonic() - self._given_back_at > GIVE_BACK_S:
            self._given_back_at = time.monotonic()
            give_back()
        runs = {run: pack for pack, (_, run) in self._hosts.items()}
        over, _ = ray.wait(list(runs), num_returns=len(runs), timeout=0) if runs else ([], [])
        ends = {runs[run]: PackEnd(runs[run], *_failure(run)) for run in over}
        asks = {pack: calling(host.ping.remote) for pack, (host, _) in self._hosts.items()}
        for pack, why in self._pings.silent(asks).items():
            ends.setdefault(pack, PackEnd(pack, f"its host {why}"))
        return list(ends.values())

    def serve(self, backbones: Collection[Backbone]) -> None:
        self._applications.want(backbones)
        if time.monotonic() - self._looked_at > EVERY_S:
            self._looked_at = time.monotonic()
            self._serve_s_own.look()
            self._replicas.look()

    def devices(self) -> Sequence[Device]:
        return self._discovery.devices()

    def sizes(self, backbone: Backbone, devices: Collection[Device]) -> tuple[Size, ...]:
        return self._size(backbone, devices) if self._size else ()

    def draining(self) -> Collection[str]:
        return self._discovery.draining()

    def gone(self, replicas: Collection[Replica]) -> Collection[ReplicaId]:
        """A replica is listed before it opens, so one that a list made since has not is dead."""
        missing = [replica for replica in replicas if replica.actor not in self._actors]
        if not missing or time.monotonic() - self._listed_at < ACTORS_S:
            return ()
        self._listed_at = time.monotonic()
        self._actors = {one["name"] for one in ray.util.list_named_actors(all_namespaces=True)}
        return [replica.id for replica in missing if replica.actor not in self._actors]


def _serve_s_replicas() -> Collection[Watched]:
    """Of all applications: ingresses, too. One that loads a backbone answers meanwhile."""
    names = (one["name"] for one in ray.util.list_named_actors(all_namespaces=True))
    return [Watched(name, SERVE_NAMESPACE, "is_allocated") for name in names if ReplicaID.is_full_id_str(name)]


def _failure(run: ray.ObjectRef[None]) -> tuple[str | None, Collection[JobId]]:
    """What ended a host's `run`, None if it returned, and the jobs that are suspected of it."""
    try:
        ray.get(run)
        return None, ()
    except RayTaskError as error:
        if isinstance(error.cause, PackDied):
            return str(error.cause), error.cause.suspects
        return f"{type(error.cause).__name__}: {error.cause}", ()
    except RayActorError as error:
        return str(error).partition("\n")[0], ()
