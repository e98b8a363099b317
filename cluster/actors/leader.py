"""The controller as a Ray actor: its loop in a thread, its heartbeat for whoever watches, restarted when it dies."""

from __future__ import annotations

import logging
import os
import time
from secrets import token_hex
from threading import Event, Thread
from typing import cast

import ray
from ray.actor import ActorHandle

from polygraft.cluster.actors.controller import Controller
from polygraft.cluster.actors.effects import Means, RayEffects
from polygraft.cluster.actors.place import ON_HEAD
from polygraft.cluster.model import Limits
from polygraft.cluster.store.connect import connect

LOG = logging.getLogger(__name__)
SILENT_S = 120.0  # far above what a round takes: its packs end with it


def start_leader(store_url: str, limits: Limits, means: Means, *, name: str) -> ActorHandle[Leader]:
    """A named actor that leads from its first moment on. Ray must be able to carry `means` to it."""
    options = ray.remote(Leader).options(name=name, num_cpus=0, resources=ON_HEAD, max_restarts=-1, max_concurrency=4)
    return cast(ActorHandle[Leader], options.remote(store_url, limits, means))


class Leader:
    """Starts to lead when it is made. Its process ends with the loop, so that Ray makes a new one.

    Without `holder` it takes the lease from whoever leads. With one it waits until no other holder leads: the same
    actor, when Ray starts it again, goes on at once under its name, and another cluster's does not interfere.
    """

    def __init__(self, store_url: str, limits: Limits, means: Means, holder: str | None = None) -> None:
        self._stop = Event()
        self._beat_at = time.monotonic()
        self._steal = holder is None
        self._controller = Controller(
            connect(store_url),
            RayEffects(means),
            limits=limits,
            holder=holder or f"controller-{os.getpid()}-{token_hex(4)}",
        )
        self._thread = Thread(target=self._run, name="controller", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise if the loop is over or has been silent for long."""
        silent_s = time.monotonic() - self._beat_at
        if not self._thread.is_alive() or silent_s > SILENT_S:
            raise RuntimeError(f"the controller's loop has been silent for {silent_s:.0f} s")

    def stop(self) -> None:
        """Give up the lease and end the loop; packs go on until this actor is killed."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._controller.run(self._stop, self._beat, steal=self._steal)
        except BaseException:
            LOG.exception("the controller's loop failed")
            os._exit(1)  # Ray starts it again; half a controller is worse than none

    def _beat(self) -> None:
        self._beat_at = time.monotonic()
