"""Clears away what was left behind, before another supervisor starts on the same folder: processes of one that was
killed, and drafts of writers that were."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

from polygraft.launch.processes import end_session
from polygraft.launch.run_folder import RunFolder

_GRACE_S = 20.0
_DRAFT_S = 3600.0


def remove_drafts(data: Path, *, now: float) -> int:
    """How many half-written files, folders and uploads were removed from the data folder; those younger than an hour
    are left, as another service may use the same folder. `now` is in seconds since 1970."""
    drafts = [*data.glob("*/.*.draft-*"), *data.glob("jobs/*/.*.draft-*"), *data.glob("files/.incoming/*")]
    old = [path for path in drafts if now - path.lstat().st_mtime > _DRAFT_S]
    for path in old:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(old)


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
