"""Stops the service under a home folder and waits until nothing of it is left."""

from __future__ import annotations

import signal

from polygraft.cluster.settings import Settings
from polygraft.launch.leftovers import clear
from polygraft.launch.output import Failure
from polygraft.launch.run_folder import RunFolder

_GRACE_S = 90.0


class StopFailed(Failure):
    """The supervisor did not end in time."""


def stop(settings: Settings) -> bool:
    """Whether there was a service to stop, or the rest of one. Raises StopFailed."""
    folder = RunFolder(settings.home)
    last = folder.supervision
    if last is None or not last.supervisor.alive():
        settings.service_path.unlink(missing_ok=True)
        return clear(folder) > 0
    last.supervisor.signal(signal.SIGTERM)
    if not last.supervisor.wait(_GRACE_S):
        raise StopFailed(
            f"the supervisor, pid {last.supervisor.pid}, did not end within {_GRACE_S:.0f} s; "
            f"see {folder.log('supervisor')}"
        )
    return True
