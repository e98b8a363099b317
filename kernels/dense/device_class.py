"""The class of a device: what decides, besides a row and its graft, which bits a CPU computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polygraft.kernels.common.processor import processor
from polygraft.kernels.compiled.build import FOLDER, Unavailable, toolchain
from polygraft.kernels.dense.library import library


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """CPUs of one class compute the same bits from the same rows; between classes, and on GPUs, results are equal to a
    tolerance.

    A job's record and its checkpoints name the class that computed them, so that a pack that starts again elsewhere can
    say so. `processor` is vendor, family and model, by which oneDNN and MKL choose the order of a sum, or the name of
    the GPU. `compiled` is the digest of the compiled ops, their compiler and the instructions that they are held to; ""
    where torch's run. Its version is that of torch's libraries, too.
    """

    processor: str
    compiled: str
    torch: str
    threads: int

    def __str__(self) -> str:
        return f"{self.processor}, ops {self.compiled or 'of torch'}, torch {self.torch}, {self.threads} threads"


def device_class(device: torch.device | str = "cpu") -> DeviceClass:
    """The class of this process on a device: of its machine, its environment and the threads that torch uses in it."""
    if torch.device(device).type == "cuda":
        return DeviceClass(torch.cuda.get_device_name(device), "", torch.__version__, torch.get_num_threads())
    return DeviceClass(processor(), _compiled(), torch.__version__, torch.get_num_threads())


def _compiled() -> str:
    try:
        return toolchain().digest(sorted(FOLDER.glob("*/*.cpp"))) if library() else ""
    except Unavailable:
        return ""
