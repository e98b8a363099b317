"""The compiled part of the dense op, linear.cpp: built by this machine's compiler when it is first asked for."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path

SOURCE, TILES = Path(__file__).with_name("linear.cpp"), Path(__file__).with_name("tiles.h")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w")
NEEDED = {"amx_tile", "amx_bf16", "avx512_bf16", "avx512bw", "avx512vl"}
LIMIT = "ONEDNN_MAX_CPU_ISA"  # who holds oneDNN to an older instruction set means us, too
_TIMEOUT_S = 120


class Unavailable(Exception):
    """Why there is no compiled product here."""


@cache
def library() -> ctypes.CDLL | None:
    """The library, loaded; None where `build` says why not. Nothing but speed depends on it."""
    try:
        found = ctypes.CDLL(str(build()))
    except (Unavailable, OSError) as error:
        logging.getLogger(__name__).info("products are torch's: %s", error)
        return None
    for function, kinds in ((found.linear, "piiipipipipii"), (found.outer, "ppiipipii")):
        function.argtypes = [ctypes.c_void_p if kind == "p" else ctypes.c_int64 for kind in kinds]
        function.restype = None
    return found if found.ready() else None


def build() -> Path:
    """The path of the built library. Raises Unavailable on a CPU without AMX, or without a compiler that builds it.

    It is kept with the user's caches, under a name of all that it is made from, the CPU's features too: a home folder
    may be shared by machines that differ.
    """
    features = _features()
    if missing := NEEDED - features:
        raise Unavailable(f"this CPU has no {', '.join(sorted(missing))}")
    limit = os.environ.get(LIMIT, "ALL").upper()
    if limit not in ("ALL", "DEFAULT") and "AMX" not in limit:
        raise Unavailable(f"{LIMIT} is {limit}")
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise Unavailable("no C++ compiler is on PATH; install g++ 11 or later")
    made_from = (SOURCE.read_text(), TILES.read_text(), compiler, *FLAGS, *sorted(features))
    path = _folder() / f"linear-{sha256(chr(0).join(made_from).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        _compile(compiler, path)
    return path


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        try:
            ran = subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, text=True, timeout=_TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{compiler}: {error}") from None
        if ran.returncode:
            raise Unavailable(f"{compiler} cannot build {SOURCE.name}: {ran.stderr.strip()[-500:]}")
        os.replace(made, path)  # at once, however many processes build it


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "polygraft" / "kernels"


def _features() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())
