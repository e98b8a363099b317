"""How long a pack's workers may take to begin."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from ray.train.v2._internal.execution.callback import WorkerGroupCallback

_LOG = logging.getLogger(__name__)


class Starting(WorkerGroupCallback):
    """Ends the process that starts the workers, and with it the run, where they have not begun after `seconds`: Train
    waits without a bound for what they import, and one that is stopped says nothing."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        timer = Timer(self._seconds, self._end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end(self) -> None:
        _LOG.error("the pack's workers have not begun after %g s", self._seconds)
        os.kill(os.getpid(), signal.SIGKILL)
