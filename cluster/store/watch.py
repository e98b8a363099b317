"""Keeps the embedded server from a write to a full disk, which under `appendfsync always` ends it, and knows whether it
answers.

While its disk has little room the server refuses to write, reads go on, and it writes again when there is room. It
starts refusing, so that one that is started on a full disk stays up. What it deletes by itself in the meantime, such as
keys that expire, may fail to reach the disk: under `everysec` it survives that, and nothing of it was promised.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event, Thread

from polygraft.cluster.store.base import StoreError
from polygraft.cluster.store.wire import Wire
from polygraft.kernels.common.room import free_bytes

_LOG = logging.getLogger(__name__)
LITTLE_BYTES = 4 << 20
ENOUGH_BYTES = 6 << 20
LOOK_S = 0.1
PING_S = 1.0

REFUSING: Mapping[str, str] = {"min-replicas-to-write": "1", "appendfsync": "everysec"}  # it never has a replica
WRITING: Mapping[str, str] = {"appendfsync": "always", "min-replicas-to-write": "0"}  # in this order


class RoomWatch:
    """Looks at the server's disk from a thread of its own until `stop`; the server was started with REFUSING."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._wire = Wire(url)
        self._writing = False
        self._answered_at = time.monotonic()
        self._asked_at: float | None = None  # since when it owes an answer
        self._stop = Event()
        self._thread = Thread(target=self._run, name="room-watch", daemon=True)

    def start(self) -> None:
        """The server writes when this returns, if there is room. Raises StoreError."""
        self.look()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._wire.close()

    @property
    def silent_s(self) -> float:
        """For how long the server has been asked in vain."""
        asked_at = self._asked_at
        return 0.0 if asked_at is None else time.monotonic() - asked_at

    def ping(self) -> None:
        """Raises StoreError."""
        self._asked_at = self._asked_at or time.monotonic()
        self._wire.call("PING")
        self._asked_at, self._answered_at = None, time.monotonic()

    def look(self) -> None:
        """Let the server write, or have it refuse, where its disk's room asks for a change. Raises StoreError."""
        free = free_bytes(self._folder)
        writing = free >= (LITTLE_BYTES if self._writing else ENOUGH_BYTES)
        if writing == self._writing:
            return
        for name, value in (WRITING if writing else REFUSING).items():
            self._wire.call("CONFIG", "SET", name, value)
        self._writing = writing
        if not writing:
            _LOG.warning(
                "%s has %.1f MiB left: the store refuses to write until there is room", self._folder, free / 2**20
            )
        elif self._thread.is_alive():
            _LOG.warning("%s has room again: the store writes", self._folder)

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                if time.monotonic() - self._answered_at > PING_S:
                    self.ping()
                self.look()
            except (StoreError, OSError) as error:  # it has died, and whoever started it sees that too
                _LOG.debug("%s: %s", self._folder, error)
