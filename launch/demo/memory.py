"""How much memory a service takes at its worst: PSS summed over its processes, read every few seconds."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import psutil

_PERIOD_S = 3.0  # reading the maps of thirty processes is no small work


class PeakMemory:
    """Watches the processes below `root`, itself included, while the context is open.

    PSS counts a page shared by n processes as 1/n in each, so that the sum is what the service really occupies. Where
    the system has no PSS, USS (a lower bound) takes its place.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self.bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, occupied(self._root))
            if self._stop.wait(_PERIOD_S):
                return


def occupied(root: int) -> int:
    """Bytes of the process and all its descendants now; 0 when it is gone."""
    try:
        top = psutil.Process(root)
        family = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(map(_bytes, family))


def _bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
    except psutil.Error:
        return 0
    return int(getattr(memory, "pss", memory.uss))
