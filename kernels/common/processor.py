"""What the processor of this machine is called. Torch-free."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Vendor, family and model, by which libraries choose their code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    named = [fields[name] for name in ("vendor_id", "cpu family", "model") if name in fields]
    return " ".join(named) or platform.machine()


def multiplies_bf16() -> bool:
    """Whether it has instructions for products of bfloat16, as `best_dtype` of the runtime asks torch."""
    try:
        words = Path("/proc/cpuinfo").read_text().split("\n\n")[0].split()
    except OSError:
        return False
    return "avx512_bf16" in words or "amx_tile" in words
