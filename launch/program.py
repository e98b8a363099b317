"""A child of the supervisor that is a command: leads a session of its own, which is ended whole."""

from __future__ import annotations

import logging
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polygraft.launch.processes import end_session

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Program:
    """A `Child` whose output goes to the end of `log`; it is ready when `is_ready` says so, which may not raise."""

    name: str
    command: Sequence[str]
    log: Path
    is_ready: Callable[[], bool]
    environment: Mapping[str, str] | None = None
    grace_s: float = 10.0  # from SIGTERM to SIGKILL
    after: Callable[[], None] = lambda: None  # when it has ended, however that was
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def ready(self) -> bool:
        return self.is_ready()

    @property
    def excused(self) -> bool:
        return False

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )

    def end(self) -> str:
        """SIGTERM to the program, SIGKILL to whoever of its session is left when it had its time."""
        assert self._process is not None, f"{self.name} was not started"
        self._process.send_signal(signal.SIGTERM)  # does nothing to one that has ended
        try:
            self._process.wait(self.grace_s)
        except subprocess.TimeoutExpired:
            _LOG.warning("%s did not end within %.0f s of SIGTERM", self.name, self.grace_s)
        if left := end_session(self._process.pid):
            _LOG.warning("%s left %d processes behind; they are ended", self.name, left)
        status = self._process.wait()
        self.after()
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
