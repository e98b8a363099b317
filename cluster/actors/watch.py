"""Named actors that somebody else must watch: Ray starts one again that dies, and leaves alone one that is stopped or
hangs. Each is ended here, and Ray starts it again.

The controller watches Serve's, Serve's the ingresses, and these the controller: whichever hangs is ended by another.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any

import ray
from ray.actor import ActorHandle

from polygraft.cluster.actors.pings import EVERY_S, Pings

LOG = logging.getLogger(__name__)
SILENT_S = 20.0


@dataclass(frozen=True, slots=True)
class Watched:
    """An actor's name, and its method that returns at once, or raises where something is wrong."""

    name: str
    namespace: str
    method: str = "check"


class Watch:
    """Each `look` takes no longer than Ray takes to find a name."""

    def __init__(self, actors: Collection[Watched], silent_s: float = SILENT_S) -> None:
        self._actors = actors
        self._handles: dict[Watched, ActorHandle[Any]] = {}
        self._pings: Pings[Watched] = Pings(silent_s)

    def look(self) -> None:
        """Ask those that are there, and end those that have been silent for long."""
        for actor in self._actors:
            if actor not in self._handles:
                try:
                    self._handles[actor] = ray.get_actor(actor.name, namespace=actor.namespace)
                except ValueError:  # it is not there yet
                    continue
        asks = {actor: partial(_ask, handle, actor.method) for actor, handle in self._handles.items()}
        for actor in self._pings.silent(asks):
            LOG.error("%s does not answer, or says that something is wrong: it is started again", actor.name)
            ray.kill(self._handles.pop(actor), no_restart=False)

    def start(self) -> None:
        """Look for ever, in a thread of this process."""
        if self._actors:
            Thread(target=self._run, name="watch", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                self.look()
            except Exception:  # Ray ends, or the next look succeeds
                LOG.exception("nobody watches %s now", ", ".join(actor.name for actor in self._actors))
            time.sleep(EVERY_S)


def _ask(handle: ActorHandle[Any], method: str) -> ray.ObjectRef[object]:
    call: Callable[[], ray.ObjectRef[object]] = getattr(handle, method).remote
    return call()
