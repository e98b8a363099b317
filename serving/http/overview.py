"""What the control plane is doing, for `/metrics`: a snapshot that follows the log, and what its events add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from threading import Lock
from typing import Literal

from polygraft.cluster import evolve
from polygraft.cluster.events import JobCancelled, JobFailed, JobSucceeded
from polygraft.cluster.model import Snapshot
from polygraft.cluster.states import IllegalTransition, JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Store, StoredEvent

_LONG_S = 60.0  # without a look; the log may have been trimmed meanwhile
Use = Literal["pack", "replica"]
_FINISHED = {JobSucceeded: JobState.SUCCEEDED, JobFailed: JobState.FAILED, JobCancelled: JobState.CANCELLED}


class Overview:
    """Brought up to date whenever somebody asks, from any thread. It counts from when it was made, as long as somebody
    asks once a minute."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        """`clock` gives seconds since the epoch."""
        self._store = store
        self._clock = clock
        self._lock = Lock()
        self._snapshot: Snapshot | None = None
        self._counted_from = clock()
        self._looked = 0.0
        self._until = self._counted_from  # devices' time is added up until then
        self.finished = Counter(dict.fromkeys(_FINISHED.values(), 0))
        self.device_seconds: dict[Use, float] = {"pack": 0.0, "replica": 0.0}

    def look(self) -> Snapshot:
        """The snapshot now. Raises StoreUnavailable."""
        with self._lock:
            now = self._clock()
            snapshot = self._snapshot
            if snapshot is None or now - self._looked > _LONG_S:
                saved = self._store.get(keys.SNAPSHOT)
                stored = saved.value if saved else Snapshot()
                snapshot = stored if snapshot is None or _order(stored) > _order(snapshot) else snapshot
            while batch := self._store.events(snapshot.version):
                for one in batch:
                    self._pass(snapshot, min(one.event.at, now))
                    snapshot = self._after(snapshot, one)
            self._pass(snapshot, now)
            self._snapshot, self._looked = snapshot, now
            return snapshot

    def _after(self, snapshot: Snapshot, one: StoredEvent) -> Snapshot:
        if (state := _FINISHED.get(type(one.event))) is not None and one.event.at >= self._counted_from:
            self.finished[state] += 1
        try:
            return evolve.apply(snapshot, one.id, one.event)
        except IllegalTransition:  # the controller says so in its log
            return replace(snapshot, version=one.id)

    def _pass(self, snapshot: Snapshot, now: float) -> None:
        """Time went by in which devices were held as the snapshot says."""
        if (seconds := now - self._until) > 0:
            packs = sum(len(pack.devices) for pack in snapshot.packs.values() if not pack.final)
            self.device_seconds["pack"] += seconds * packs
            self.device_seconds["replica"] += seconds * sum(len(one.devices) for one in snapshot.replicas.values())
            self._until = now


def _order(snapshot: Snapshot) -> tuple[int, ...]:
    return tuple(map(int, snapshot.version.split("-")))
