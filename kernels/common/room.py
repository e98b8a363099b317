"""A disk without room: how it shows in an error, how much is left, and waiting until a write finds some."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

R = TypeVar("R")
AGAIN_S = 2.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_IN_WORDS = re.compile(rf"\(os error ({'|'.join(map(str, _FULL))})\)")  # how Rust's libraries tell of them


def is_full(error: BaseException) -> bool:
    """Whether a write failed because its disk, or its owner's share of it, is used up: it can be repeated later."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return _IN_WORDS.search(str(error)) is not None


def free_bytes(folder: Path) -> int:
    """What may still be written to the file system of a folder. Raises OSError."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def when_there_is_room(
    write: Callable[[], R],
    *,
    told: Callable[[BaseException], object] = lambda _: None,
    wait: Callable[[float], object] = time.sleep,
) -> R:
    """What `write` returns once it finds room; `told` hears of the first time that it finds none."""
    first = True
    while True:
        try:
            return write()
        except Exception as error:
            if not is_full(error):
                raise
            if first:
                told(error)
            first = False
        wait(AGAIN_S)
