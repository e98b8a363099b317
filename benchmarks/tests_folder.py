"""The tests' own modules, for scripts that build on them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType


def tests_of(tree: Path) -> None:
    """Let `tests.` be the tree's, without its folders on the path, where `kernels` would hide another package."""
    if "tests" not in sys.modules:
        package = ModuleType("tests")
        package.__path__ = [str(tree / "tests")]
        sys.modules["tests"] = package
