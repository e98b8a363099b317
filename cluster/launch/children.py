"""The supervisor's loop: starts children in order, starts a dead one again, ends them in reverse order."""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polygraft.cluster.launch.processes import end_session
from polygraft.cluster.launch.restarts import Restarts

_LOG = logging.getLogger(__name__)
_PERIOD_S = 0.2


class GaveUp(Exception):
    """A child died before it was ever ready, or too often; all children are ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """How one child is started, known to be ready, and cleaned up after. Its output goes to the end of `log`."""

    name: str
    command: Sequence[str]
    log: Path
    ready: Callable[[], bool]
    environment: Mapping[str, str] | None = None
    descriptors: tuple[int, ...] = ()
    grace_s: float = 10.0  # from SIGTERM to SIGKILL
    after: Callable[[], None] = lambda: None  # when it has ended, however that was


def supervise(children: Sequence[Child], stop: threading.Event, *, now: Callable[[], float] = time.monotonic) -> None:
    """Keep the children running until `stop` is set; a child starts once all before it are ready. Raises GaveUp."""
    running = [_Running(child) for child in children]
    try:
        while not stop.wait(_PERIOD_S):
            for index, one in enumerate(running):
                one.step(now(), allowed=all(earlier.is_ready for earlier in running[:index]))
    finally:
        for one in reversed(running):
            one.end()


@dataclass(slots=True)
class _Running:
    child: Child
    process: subprocess.Popen[bytes] | None = None
    is_ready: bool = False
    proven: bool = False  # was ready once
    start_at: float = 0.0
    restarts: Restarts = field(default_factory=Restarts)

    def step(self, now: float, *, allowed: bool) -> None:
        if self.process is None:
            if allowed and now >= self.start_at:
                self._start()
        elif (status := self.process.poll()) is not None:
            self._bury(now, status)
        elif not self.is_ready and self.child.ready():
            self.is_ready = self.proven = True
            _LOG.info("%s is ready", self.child.name)

    def end(self) -> None:
        """SIGTERM to the child, SIGKILL to whoever of its session is left when it had its time."""
        if self.process is None:
            return
        _LOG.info("ending %s", self.child.name)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(self.child.grace_s)
        except subprocess.TimeoutExpired:
            _LOG.warning("%s did not end within %.0f s of SIGTERM", self.child.name, self.child.grace_s)
        self._clear()

    def _start(self) -> None:
        with self.child.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.child.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.child.environment,
                pass_fds=self.child.descriptors,
                start_new_session=True,
            )
        _LOG.info("started %s, pid %d", self.child.name, self.process.pid)

    def _bury(self, now: float, status: int) -> None:
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        _LOG.error("%s %s", self.child.name, how)
        proven = self.proven or self.child.ready()  # it may have become ready since the last look
        self._clear()
        if not proven:
            raise GaveUp(f"{self.child.name} {how} before it was ready; see {self.child.log}")
        delay = self.restarts.after_death(now)
        if delay is None:
            raise GaveUp(f"{self.child.name} died too often, the last time it {how}; see {self.child.log}")
        self.start_at = now + delay

    def _clear(self) -> None:
        assert self.process is not None
        left = end_session(self.process.pid)
        if left:
            _LOG.warning("%s left %d processes behind; they are ended", self.child.name, left)
        self.process.wait()
        self.process = None
        self.is_ready = False
        self.child.after()
