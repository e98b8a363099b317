"""Memory in pages of 2 MiB, for weights that every step reads all of: a model's are more than the processor knows the
places of in pages of 4 KiB, and a virtual machine pays twice to find one."""

from __future__ import annotations

import mmap
from threading import Lock

import torch
from torch import Tensor

PAGE, LINE = 1 << 21, 64
AREA = 1 << 26  # bytes that are asked for at a time; what is not used of them takes no memory


class LargePages:
    """Copies of tensors, one beside the other. An area is given back when all copies in it are gone."""

    def __init__(self) -> None:
        self._rest, self._lock = torch.empty(0, dtype=torch.uint8), Lock()

    def copy(self, x: Tensor) -> Tensor:
        """`x`, contiguous, at an address that is a multiple of 64; in pages of the usual size where the system has no
        others."""
        size = x.numel() * x.element_size()
        with self._lock:
            if self._rest.numel() < size:
                self._rest = _area(max(AREA, size))
            taken = self._rest[:size]
            self._rest = self._rest[-(-size // LINE) * LINE :]
        return taken.view(x.dtype).view(x.shape).copy_(x)


def _area(size: int) -> Tensor:
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    area = torch.frombuffer(memory, dtype=torch.uint8)
    start = -area.data_ptr() % PAGE
    return area[start : start + -(-size // LINE) * LINE]
