"""Named points where a test can kill the process for real; in production the environment names none."""

from __future__ import annotations

import os
import signal
from pathlib import Path

VARIABLE = "POLYGRAFT_FAULT"  # "<point>=<marker file>": die at the point, once, leaving the marker


def point(name: str) -> None:
    """Die by SIGKILL here if the environment asks for it and the marker does not exist yet."""
    wanted, _, marker = os.environ.get(VARIABLE, "").partition("=")
    if wanted == name and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
