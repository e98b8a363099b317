"""Where backbones lie once they are converted or downloaded: with the user, not with a service, so that a second one
finds them."""

from __future__ import annotations

import os
from pathlib import Path


def backbone_cache() -> Path:
    return _cache() / "backbones"


def speed_cache() -> Path:
    """Where it is kept how fast this machine is."""
    return _cache() / "speeds"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "polygraft"
