"""Ends what a supervisor that was killed left behind, before another one starts on the same folder."""

from __future__ import annotations

import shutil
import signal

from polygraft.launch.processes import end_session
from polygraft.launch.run_folder import RunFolder

_GRACE_S = 20.0


def clear(folder: RunFolder) -> int:
    """How many children of a dead supervisor were still there; the head first, then the store it writes to."""
    last = folder.supervision
    if last is None or last.supervisor.alive():
        return 0
    left = [child for child in last.children if child.alive()]
    for child in reversed(left):
        child.signal(signal.SIGTERM)
        child.wait(_GRACE_S)
        end_session(child.pid)
    shutil.rmtree(last.scratch, ignore_errors=True)
    return len(left)
