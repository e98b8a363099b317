"""How long a pack's workers may take to begin."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import TYPE_CHECKING

from ray.train.v2._internal.execution.callback import WorkerGroupCallback

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.worker_group import WorkerGroup

_LOG = logging.getLogger(__name__)


class Starting(WorkerGroupCallback):
    """Ends the process that starts the workers, and with it the run, where they have not begun after `seconds`: Train
    waits without a bound for what they import and for their first call, and one that is stopped says nothing."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timer: Timer | None = None

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        """Until `after_worker_group_training_start`, or an error."""
        self._cancel()  # of a group that died between the two
        self._timer = Timer(self._seconds, self._end)
        self._timer.daemon = True
        self._timer.start()
        try:
            yield
        except BaseException:
            self._cancel()
            raise

    def after_worker_group_training_start(self, worker_group: WorkerGroup) -> None:
        self._cancel()

    def before_worker_group_shutdown(self, worker_group: WorkerGroup) -> None:
        self._cancel()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        _LOG.error("the pack's workers have not begun after %g s", self._seconds)
        os.kill(os.getpid(), signal.SIGKILL)
