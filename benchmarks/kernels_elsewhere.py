"""What transformers and vLLM find under the name `kernels`: Hugging Face's package where it is installed, else nothing,
and in no case kernels.py of this folder, which is first on a script's path. Imported for that alone."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

_HERE = Path(__file__).resolve().parent

if "kernels" not in sys.modules:
    _path = sys.path[:]
    sys.path[:] = [path for path in _path if Path(path).resolve() not in (_HERE, _HERE.parent)]
    try:
        import_module("kernels")
    except ImportError:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # which says that there is none
    finally:
        sys.path[:] = _path
