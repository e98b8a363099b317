"""Grafts on their way from the artefact folder into memory, read while the engine's steps go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from polygraft.cluster.model import GraftId
from polygraft.grafts.runtime.process import in_own_thread
from polygraft.grafts.runtime.stacks import Resident
from polygraft.serving.residency import Residency

_AT_ONCE = 4  # grafts that may be in memory without being in the residency's budget yet


class Loader:
    """Reads one graft at a time in a thread of its own and calls `wake` after each."""

    def __init__(self, residency: Residency, *, wake: Callable[[], None]) -> None:
        self._residency = residency
        self._wake = wake
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="graft-loader")
        self._reading: dict[GraftId, Future[Resident]] = {}
        # Grafts that were read, or tried, and the seconds that it took; only the thread writes them.
        self.loads = 0
        self.load_s = 0.0

    def ask(self, graft: GraftId) -> Resident | None:
        """The graft once it is read, until then None; the first to ask starts it. Raises what reading it raised."""
        if graft not in self._reading:
            if len(self._reading) < _AT_ONCE:
                self._reading[graft] = self._pool.submit(in_own_thread, partial(self._read, graft))
                self._reading[graft].add_done_callback(lambda _: self._wake())
            return None
        future = self._reading[graft]
        return future.result() if future.done() else None

    def keep(self, grafts: Items[GraftId]) -> None:
        """Forget all but the first of these: nobody waits for the others any more, or those before them go first."""
        for graft in self._reading.keys() - set(grafts[:_AT_ONCE]):
            self._reading.pop(graft).cancel()

    def _read(self, graft: GraftId) -> Resident:
        began = time.perf_counter()
        try:
            return self._residency.fetch(graft)
        finally:
            self.loads += 1
            self.load_s += time.perf_counter() - began

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
