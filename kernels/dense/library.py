"""The compiled part of the dense op, linear.cpp, as this process calls it."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

from polygraft.kernels.compiled.build import Unavailable, build
from polygraft.kernels.dense.structures import SIZES

SOURCE = Path(__file__).with_name("linear.cpp")


@cache
def library() -> ctypes.CDLL | None:
    """The library, loaded; None where there is none. Nothing but speed depends on it."""
    try:
        return load(build(SOURCE))
    except Unavailable as error:
        logging.getLogger(__name__).info("products are torch's: %s", error)
        return None


def load(path: Path) -> ctypes.CDLL:
    """A built library, ready to be called. Raises Unavailable where it cannot be, and TypeError where structures.py and
    linear.cpp do not agree."""
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path}: {error}") from None
    if not loaded.ready():
        raise Unavailable("the kernel does not let this process use AMX's tiles")
    for name, size in SIZES.items():
        told = loaded[f"size_of_{name.lower()}"]
        told.restype = ctypes.c_int64
        if told() != size:
            raise TypeError(
                f"{path.name}: {name} has {told()} bytes in {SOURCE.name} and {size} in structures.py: "
                "their fields must be the same ones, in the same order"
            )
    for function, kinds in ((loaded.linear, "p"), (loaded.outers, "pii")):
        function.argtypes = [ctypes.c_void_p if kind == "p" else ctypes.c_int64 for kind in kinds]
        function.restype = None
    return loaded
