"""How a process that computes is set up; torch-free, since it holds before the process starts."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_UNUSED = ("accelerate", "scipy", "triton")  # what transformers and torch import only because it is installed
_UNCOMPILED = "could not create a primitive"  # oneDNN's


def device_environment(cores: int) -> dict[str, str]:
    """Environment of a process that computes on a device with so many cores.

    A thread a core, whatever Ray gives an actor, and threads that spin only briefly before they sleep, since they share
    the cores with other processes. Memory that a step frees stays at hand for the next one: handing pages back between
    steps made packed training 8% slower (docs/log.md). So `give_back` says when it goes.
    """
    return {"OMP_NUM_THREADS": str(cores), "GOMP_SPINCOUNT": "20000", **_allocator()}


def _allocator() -> dict[str, str]:
    """The jemalloc that comes with Ray, where it does; else glibc's allocator in one heap.

    glibc before 2.38 cannot use the hole of an aligned block for another of the same size, so that the heap of a pack
    grows by tens of MiB a step. Nothing is retained: what is given back leaves the address space, too, which a limit
    may be set for (RLIMIT_AS) and where oneDNN maps its kernels.
    """
    ray = find_spec("ray")
    library = Path(next(iter(ray.submodule_search_locations or ()), "")) / "core" / "libjemalloc.so" if ray else Path()
    if library.is_file():
        return {"LD_PRELOAD": str(library), "MALLOC_CONF": "narenas:1,dirty_decay_ms:-1,retain:false"}
    return {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "33554432",
        "MALLOC_TRIM_THRESHOLD_": "1000000000",
    }


def give_back() -> None:
    """Hand freed memory back to the system: after loading, never between steps."""
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallctl"):
        allocator.mallctl(b"arena.4096.purge", None, None, None, ctypes.c_size_t(0))  # 4096 stands for all arenas
    elif hasattr(allocator, "malloc_trim"):
        allocator.malloc_trim(0)


def settle() -> None:
    """What the process holds now it holds for good: the collector looks at it no more. Over what torch, Ray or FastAPI
    make when they are imported a full collection takes a quarter of a second, in which no thread goes on."""
    gc.freeze()


def allocation_failed(error: BaseException) -> bool:
    """Whether it says that memory was short, or could never suffice.

    oneDNN has no words for it: what it has a descriptor for and cannot create, it has no memory to compile.
    """
    said = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
    if isinstance(error, MemoryError) or str(error) == _UNCOMPILED:
        return True
    return any(text in str(error) for text in said)


def unfit(error: BaseException) -> bool:
    """Whether it says that this process can no longer compute what another one can: a GPU's context is lost, or oneDNN
    had no memory to compile a product, which it then never compiles for anybody's rows."""
    import torch

    return isinstance(error, torch.AcceleratorError) or str(error) == _UNCOMPILED


def chosen_device(setting: str) -> str:
    """Where a process computes by its setting: "auto" takes a GPU where there is one. Raises ValueError where "cuda" is
    asked for and there is none."""
    import torch

    there = torch.cuda.is_available()
    if setting == "cuda" and not there:
        raise ValueError("device: 'cuda' is asked for, and torch finds no GPU here; choices: auto, cpu")
    return "cuda" if there and setting != "cpu" else "cpu"


@contextmanager
def lean_imports() -> Iterator[None]:
    """Inside, packages that transformers would import only because they are installed cannot be: 58 MiB a process.

    For processes that are ours alone, since transformers remembers that they are absent; nothing changes on a GPU.
    """
    import torch

    hidden = [name for name in _UNUSED if name not in sys.modules and not torch.cuda.is_available()]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None stands for "cannot be imported"
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


def in_own_thread(make: Callable[[], T]) -> T:
    """What `make` returns, made in a thread that then ends, and its OpenMP team with it.

    Each thread that ever computed in parallel keeps a team, and as soon as the teams of a process outnumber its cores
    OpenMP lets waiting threads sleep at once: a decode step took 107 ms in place of 60 (docs/log.md). So a process
    that computes in one thread does everything else that computes through here.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
