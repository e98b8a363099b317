"""The GPU that a part runs on: a real one, or the fake device of the tests for a dry run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

_WARM = 3
# Peaks of the vendor's datasheets (dense bf16, memory), by a part of the card's name.
PEAKS = {"A100": (312e12, 2039e9), "H100": (989e12, 3350e9), "H200": (989e12, 4800e9), "L40S": (362e12, 864e9)}

Summary = Mapping[str, float | Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Card:
    """`real` is whether tensors have values and time passes."""

    device: torch.device
    real: bool

    def wait(self) -> None:
        """Until the device has done all it was asked to."""
        if self.real:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        """Of a call on the device, the median of some by its own clock; NaN for what has none."""
        if not self.real:
            call()
            return float("nan")
        for _ in range(_WARM):
            call()
        edge: Callable[[], torch.cuda.Event] = partial(torch.cuda.Event, enable_timing=True)
        edges = [(edge(), edge()) for _ in range(calls)]
        for start, stop in edges:
            start.record()
            call()
            stop.record()
        self.wait()
        return float(median(start.elapsed_time(stop) for start, stop in edges)) / 1e3

    def forget_peak(self) -> int:
        """Bytes that tensors take now; the peak begins anew."""
        if not self.real:
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """The most bytes that tensors took since then."""
        return torch.cuda.max_memory_allocated() if self.real else 0

    @contextmanager
    def profiled(self, trace: Path) -> Iterator[Callable[[], Summary]]:
        """Write a trace that chrome://tracing reads; what is yielded says, afterwards, where the device's time went."""
        if not self.real:
            yield dict
            return
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            yield lambda: _summary(profiler)
            self.wait()
        profiler.export_chrome_trace(str(trace))


def _summary(profiler: torch.profiler.profile) -> Summary:
    events = profiler.events()  # type: ignore[no-untyped-call]
    kernels = [event for event in events or () if str(event.device_type).endswith("CUDA")]
    spent: dict[str, float] = {}
    for kernel in kernels:
        spent[kernel.name] = spent.get(kernel.name, 0.0) + kernel.time_range.elapsed_us()
    most = sorted(spent.items(), key=lambda pair: -pair[1])[:25]
    edges = [edge for kernel in kernels for edge in (kernel.time_range.start, kernel.time_range.end)]
    return {
        "launches": len(kernels),
        "busy_us": sum(spent.values()),
        "from_first_to_last_us": max(edges) - min(edges) if edges else 0.0,
        "most_us": dict(most),
    }


def describe(card: Card) -> Mapping[str, object]:
    """The GPU, its driver, and who else is on it."""
    if not card.real:
        return {"name": "fake", "real": False}
    facts = torch.cuda.get_device_properties(card.device)
    asked = "name,driver_version,memory.total,memory.used,clocks.max.sm,power.limit,utilization.gpu"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except OSError as error:
        said = str(error)
    return {
        "name": facts.name,
        "real": True,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_bytes": facts.total_memory,
        "processors": facts.multi_processor_count,
        "cuda": torch.version.cuda,
        "nvidia_smi": {"asked": asked, "said": said},
    }


def peaks(card: Card) -> tuple[float, float] | None:
    """(flop/s, bytes/s) that the vendor states, where the card is known here."""
    if not card.real:
        return None
    name = torch.cuda.get_device_name(card.device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
