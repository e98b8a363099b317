"""Benchmarks are scripts that import each other by bare names; their folder goes last on the path, to hide nothing."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
