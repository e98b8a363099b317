"""The supervisor's loop: starts children in order, starts a dead one again, ends them in reverse order."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from polygraft.kernels.common.room import is_full
from polygraft.launch.restarts import Restarts

_LOG = logging.getLogger(__name__)
_PERIOD_S = 0.2
EXCUSED_S = 1.0


class GaveUp(Exception):
    """A child died before it was ever ready, or too often; all children are ended. `told`: the message says why."""

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


class Child(Protocol):
    """One process and what it starts. Of these only `start` may raise, GaveUp."""

    @property
    def name(self) -> str: ...

    @property
    def pid(self) -> int: ...

    @property
    def alive(self) -> bool: ...

    @property
    def ready(self) -> bool:
        """Whether the children after it may start."""
        ...

    @property
    def excused(self) -> bool:
        """Whether its death has a cause that passes by itself, such as a full disk: it is not counted then."""
        ...

    def start(self) -> None: ...

    def end(self) -> str:
        """End it if it is alive, clear away what is left of it, and say how it ended."""
        ...


def supervise(
    children: Sequence[Child],
    stop: threading.Event,
    *,
    on_change: Callable[[Sequence[Child]], None] = lambda _: None,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Keep the children running until `stop` is set; a child starts once all before it are ready. Raises GaveUp.

    `on_change` sees the children that were started each time one has started or died. Where it finds no room on the
    disk it is called again.
    """
    watched = [_Watched(child) for child in children]
    changed = False
    try:
        while not stop.wait(_PERIOD_S):
            for index, one in enumerate(watched):
                changed |= one.step(now(), allowed=all(earlier.ready for earlier in watched[:index]))
                if changed:
                    changed = not _told(on_change, [other.child for other in watched if other.started])
    finally:
        for one in reversed(watched):
            if one.started:
                _LOG.info("ending %s", one.child.name)
                _LOG.info("%s %s", one.child.name, one.child.end())


def _told(on_change: Callable[[Sequence[Child]], None], children: Sequence[Child]) -> bool:
    try:
        on_change(children)
    except OSError as error:
        if not is_full(error):
            raise
        return False
    return True


@dataclass(slots=True)
class _Watched:
    child: Child
    started: bool = False
    ready: bool = False
    proven: bool = False  # was ready once
    start_at: float = 0.0
    restarts: Restarts = field(default_factory=Restarts)

    def step(self, now: float, *, allowed: bool) -> bool:
        """Whether the child was started or found dead."""
        if not self.started:
            if not allowed or now < self.start_at:
                return False
            self.child.start()
            self.started = True
            _LOG.info("started %s, pid %d", self.child.name, self.child.pid)
            return True
        if not self.child.alive:
            self._bury(now)
            return True
        if not self.ready and self.child.ready:
            self.ready = self.proven = True
            _LOG.info("%s is ready", self.child.name)
        return False

    def _bury(self, now: float) -> None:
        proven = self.proven or self.child.ready  # it may have become ready since the last look
        how = self.child.end()
        self.started = self.ready = False
        _LOG.error("%s %s", self.child.name, how)
        if not proven:
            raise GaveUp(f"{self.child.name} {how} before it was ready")
        delay = EXCUSED_S if self.child.excused else self.restarts.after_death(now)
        if delay is None:
            raise GaveUp(f"{self.child.name} died too often; the last time it {how}")
        self.start_at = now + delay
