"""Stops the service under a home folder and waits until nothing of it is left."""

from __future__ import annotations

import signal

from polygraft.cluster.launch.output import Failure
from polygraft.cluster.launch.run_folder import RunFolder
from polygraft.cluster.settings import Settings

_GRACE_S = 60.0


class StopFailed(Failure):
    """The supervisor did not end in time."""


def stop(settings: Settings) -> bool:
    """Whether there was a service to stop. Raises StopFailed."""
    supervision = RunFolder(settings.home).supervision
    if supervision is None or not supervision.identity.alive():
        settings.service_path.unlink(missing_ok=True)
        return False
    supervision.identity.signal(signal.SIGTERM)
    if not supervision.identity.wait(_GRACE_S):
        raise StopFailed(f"the supervisor, pid {supervision.pid}, did not end within {_GRACE_S:.0f} s; see {RunFolder(settings.home).log('supervisor')}")
    return True
