"""What is measured on a node once: how fast its devices compute. Kept in files, one for each class of device, since
measuring takes a process that imports torch."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from polygraft.cluster.actors.discovery import GpuFacts, NodeFacts
from polygraft.kernels.common.atomic import write_text
from polygraft.kernels.common.processor import processor

_CONTEXT_BYTES = 1 << 30  # of a GPU, for what CUDA keeps beside tensors


@dataclass(frozen=True, slots=True)
class NodeScout:
    """A `Scout`, which travels to the nodes; `folder` is where the speeds are kept there."""

    folder: Path
    gpus: bool

    def __call__(self, cores: int) -> NodeFacts:
        if self.gpus and (found := _gpus(self.folder)):
            return NodeFacts(gpus=found)
        name = f"{processor()}, torch {version('torch')}, {cores} threads"
        return NodeFacts(cpu_speed=_speed(self.folder, name, "cpu", cores))


def _gpus(folder: Path) -> tuple[GpuFacts, ...]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        speed = _speed(folder, f"{properties.name}, torch {torch.__version__}", f"cuda:{index}", 1)
        found.append(GpuFacts(index, properties.total_memory - _CONTEXT_BYTES, speed))
    return tuple(found)


def _speed(folder: Path, name: str, device: str, threads: int) -> float:
    """The kept speed of this class of device, else measured; kept where nothing else slowed it down."""
    file = folder / f"{sha256(name.encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # absent or not ours: measured afresh
        return float(json.loads(file.read_text())["flops_per_s"])
    from polygraft.grafts.runtime.speed import product_speed

    quiet = os.getloadavg()[0] <= (os.cpu_count() or 1)
    speed = product_speed(device, threads)
    if quiet:
        with suppress(OSError):  # a folder that cannot be written only costs the next reader time
            write_text(file, json.dumps({"device": name, "flops_per_s": speed}))
    return speed
