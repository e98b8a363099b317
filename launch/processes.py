"""Which process is meant (a pid and its start time), and how a whole session of processes is ended.

A child of the supervisor leads a session of its own, and neither Ray nor Valkey ever leaves it: Ray's workers make
process groups, not sessions. So "everything the head started" is exactly "everything in the head's session", whoever
is left of it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil

_SAME_START_S = (
    1.0  # two readings of one process's start time differ by the kernel's tick and by corrections of the clock
)
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that cannot be mistaken for a later one with the same pid; `started` is in seconds since 1970."""

    pid: int
    started: float

    @staticmethod
    def of(pid: int) -> Identity:
        """Raises psutil.NoSuchProcess."""
        return Identity(pid, psutil.Process(pid).create_time())

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < _SAME_START_S
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def signal(self, number: signal.Signals) -> None:
        """Sends the signal if the process is still this one."""
        if self.alive():
            _send(self.pid, number)

    def wait(self, timeout_s: float) -> bool:
        """Whether the process was gone within the time."""
        return _until(lambda: not self.alive(), timeout_s)


def session(leader: int) -> Iterator[int]:
    """Pids of the live processes in the session that `leader` leads or led; the kernel gives no such pid away while
    one is left."""
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                yield process.pid
        except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            continue


def end_session(leader: int, *, grace_s: float = 2.0) -> int:
    """Ends whoever is left in the session, politely and then by force; returns how many there were."""
    left = list(session(leader))
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        for pid in session(leader):
            _send(pid, number)
        if _until(lambda: not any(session(leader)), wait_s):
            break
    return len(left)


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _until(done: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
