"""Which files were read without finding a fault, so that the jobs of a search do not read theirs anew one by one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path

from polygraft.grafts.text.jsonl import as_written

_KEPT = 1000


class Checked:
    """The last files, each as it was written and by the way it was read, with the tokens of its longest example.
    Threads may share it."""

    def __init__(self, kept: int = _KEPT) -> None:
        self._longest: OrderedDict[Hashable, int] = OrderedDict()
        self._kept = kept

    def longest(self, path: Path, how: Hashable) -> int | None:
        """None where the file was not read this way since it was last written. Raises FileNotFoundError."""
        return self._longest.get((as_written(path), how))

    def note(self, path: Path, how: Hashable, longest: int) -> None:
        self._longest[as_written(path), how] = longest
        while len(self._longest) > self._kept:
            self._longest.popitem(last=False)
