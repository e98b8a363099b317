"""How much memory this machine has."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def ram(limits: tuple[Path, ...] = _CGROUP) -> int:
    """Bytes that the processes of this machine, or of this container, may take together."""
    found = [psutil.virtual_memory().total]
    for file in limits:
        text = file.read_text().strip() if file.exists() else ""
        if text.isdecimal():  # else "max"
            found.append(int(text))
    return min(found)


def available(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that new processes may take: what the system can free, and what is left of this container's limit."""
    found = [psutil.virtual_memory().available]
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()).isdecimal():  # else "max"
        found.append(int(text) - int(used.read_text()) + _file_pages(cgroup / "memory.stat"))
    return max(0, min(found))


def _file_pages(stat: Path) -> int:
    """What counts as used, but is given back when it is asked for."""
    lines = (line.split() for line in stat.read_text().splitlines())
    return sum(int(number) for name, number in lines if name in ("inactive_file", "active_file"))
