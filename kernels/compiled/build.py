"""How C++ sources of kernels/ are built: by this machine's compiler, when they are first asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from polygraft.kernels.common.atomic import make_folder, whole_file

FOLDER = Path(__file__).parents[1]  # sources include the headers of kernels/ by their paths in it
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w")
VECTORS, TILES = {"avx512bw", "avx512vl", "avx512_bf16"}, {"amx_tile", "amx_bf16"}  # what a CPU must have, and may
LIMIT = "ONEDNN_MAX_CPU_ISA"  # who holds oneDNN to an older instruction set means us, too
_TIMEOUT_S = 120


class Unavailable(Exception):
    """Why nothing is compiled here."""


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What sources are built with: a compiler, its flags, and the features of the CPU that it builds for."""

    compiler: str
    flags: tuple[str, ...]
    features: tuple[str, ...]

    def digest(self, sources: Iterable[Path], *more: str) -> str:
        """Of all that a library of these sources and `more` flags is made from, the headers of kernels/ among it."""
        texts = [path.read_text() for path in (*sources, *sorted(FOLDER.glob("*/*.h")))]
        made_from = (*texts, self.compiler, *self.flags, *more, *self.features)
        return sha256(chr(0).join(made_from).encode()).hexdigest()[:16]


def toolchain() -> Toolchain:
    """For AMX's tiles where there are any, else for AVX-512's products of bf16. Raises Unavailable on a CPU without
    either, or without a compiler."""
    features = _features()
    if missing := VECTORS - features:
        raise Unavailable(f"this CPU has no {', '.join(sorted(missing))}")
    limit = os.environ.get(LIMIT, "ALL").upper()
    tiles = features >= TILES and (limit in ("ALL", "DEFAULT") or "AMX" in limit)
    if limit not in ("ALL", "DEFAULT") and not any(part in limit for part in ("BF16", "FP16", "AMX")):
        raise Unavailable(f"{LIMIT} is {limit}")
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise Unavailable("no C++ compiler is on PATH; install g++ 11 or later")
    return Toolchain(compiler, (*FLAGS, "-DAMX") if tiles else FLAGS, tuple(sorted(features)))


def build(source: Path, *more: str) -> Path:
    """The path of the library built of a source with `more` flags. Raises Unavailable without what it takes.

    It is kept with the user's caches, under a name of all that it is made from, the CPU's features too: a home folder
    may be shared by machines that differ.
    """
    tools = toolchain()
    path = _folder() / f"{source.stem}-{tools.digest((source,), *more)}.so"
    if not path.exists():
        _compile(tools.compiler, (*tools.flags, *more), source, path)
    return path


def _compile(compiler: str, flags: Sequence[str], source: Path, path: Path) -> None:
    make_folder(path.parent, mode=0o700)
    with whole_file(path) as made:  # at once, however many processes build it
        try:
            ran = subprocess.run(
                [compiler, *flags, f"-I{FOLDER}", str(source), "-o", str(made)],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{compiler}: {error}") from None
        if ran.returncode:
            raise Unavailable(f"{compiler} cannot build {source.name}: {ran.stderr.strip()[-500:]}")


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "polygraft" / "kernels"


def _features() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())
