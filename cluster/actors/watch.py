"""Named actors that somebody else must watch: Ray starts one again that dies, and leaves alone one that is stopped or
hangs. Each is ended here, and Ray starts it again.

The controller watches Serve's and Serve's replicas, the ingresses among them, and these the controller: whichever hangs
is ended by another.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from threading import Thread

import ray

from polygraft.cluster.actors.pings import EVERY_S, STARTING_S, Ask, Pings, calling, is_alive, told_of

LOG = logging.getLogger(__name__)
SILENT_S = 20.0


@dataclass(frozen=True, slots=True)
class Watched:
    """An actor's name, and its method that returns at once, or raises where something is wrong."""

    name: str
    namespace: str
    method: str = "check"


@dataclass(frozen=True, slots=True)
class Found:
    """How one that is there is asked, whether its start is over, and how it is ended, so that another one starts under
    its name."""

    ask: Ask
    running: Callable[[], bool]
    end: Callable[[], None]


def found(actor: Watched) -> Found | None:
    """In Ray; None where it is not there yet, or has no process, as when it waits for a node."""
    try:
        handle = ray.get_actor(actor.name, namespace=actor.namespace)
    except ValueError:
        return None
    if not told_of(handle._actor_id.hex()).get("Pid"):
        return None
    return Found(
        calling(getattr(handle, actor.method).remote),
        partial(is_alive, handle._actor_id.hex()),
        partial(ray.kill, handle, no_restart=False),
    )


class Watch:
    """Over those that `actors` says are there; each `look` takes no longer than Ray takes to find their names. One that
    starts has `starting_s` seconds from when it has a process."""

    def __init__(
        self,
        actors: Callable[[], Collection[Watched]],
        *,
        silent_s: float = SILENT_S,
        starting_s: float = STARTING_S,
        find: Callable[[Watched], Found | None] = found,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._actors, self._find = actors, find
        self._found: dict[Watched, Found] = {}
        self._pings: Pings[Watched] = Pings(silent_s, starting_s=starting_s, clock=clock)

    def look(self) -> None:
        """Ask those that are there, and end those that have been silent for long."""
        actors = dict.fromkeys(self._actors())
        for gone in self._found.keys() - actors.keys():
            del self._found[gone]
        for actor in actors:
            if actor not in self._found and (there := self._find(actor)) is not None:
                self._found[actor] = there
        asks = {actor: there.ask for actor, there in self._found.items()}
        running = [actor for actor, there in self._found.items() if not self._pings.started(actor) and there.running()]
        for actor, why in self._pings.silent(asks, running).items():
            LOG.error("%s %s: it is started again", actor.name, why)
            self._found.pop(actor).end()

    def start(self) -> None:
        """Look for ever, in a thread of this process."""
        Thread(target=self._run, name="watch", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                self.look()
            except Exception:  # Ray ends, or the next look succeeds
                LOG.exception("nobody is watched now")
            time.sleep(EVERY_S)
