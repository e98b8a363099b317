"""The benchmarks' folder goes last on the path, and its kernels.py is a script alone: transformers and vLLM look for
Hugging Face's `kernels`, and would take the script for it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

_HERE = Path(__file__).resolve().parent

sys.path[:] = [*(path for path in sys.path if Path(path).resolve() != _HERE), str(_HERE)]
_found = find_spec("kernels") if "kernels" not in sys.modules else None
if _found is not None and _found.origin == str(_HERE / "kernels.py"):
    sys.modules["kernels"] = None  # type: ignore[assignment]  # so that importing finds that there is none
