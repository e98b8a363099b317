"""What the processes that own a device share are given, tried in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from polygraft.grafts.runtime.process import allocation_failed, chosen_device, device_environment, unfit

FREED = """
import json
from polygraft.grafts.runtime.process import give_back
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
kept = [bytearray(100_000) for _ in range(1_000)]
held = resident()
del kept
freed = resident()
give_back()
print(json.dumps([held, freed, resident()]))
"""
LEAN = """
import json, sys
from polygraft.grafts.runtime.process import lean_imports
with lean_imports():
    from transformers import LlamaForCausalLM
hidden = [name for name in ("accelerate", "scipy") if name in sys.modules]
import scipy
print(json.dumps(hidden))
"""
SETTLED = """
import asyncio, gc, json
from polygraft.grafts.runtime.process import settle
before = len(gc.get_objects())
settle()
print(json.dumps([before, len(gc.get_objects())]))
"""


def test_freed_memory_stays_until_it_is_given_back() -> None:
    held, freed, given = _told(FREED)
    assert freed > held - 10_000  # KiB, of 100 MB
    assert given < held - 80_000


def test_transformers_is_loaded_without_what_it_can_do_without_and_others_may_load_it_later() -> None:
    assert _told(LEAN) == []


def test_the_collector_looks_at_nothing_that_was_there_when_a_process_settled() -> None:
    before, after = _told(SETTLED)
    assert after < before / 100


def _told(program: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | device_environment(2), capture_output=True, check=True
    )
    found: list[int] = json.loads(done.stdout)
    return found


def test_a_process_computes_on_a_gpu_where_there_is_one_unless_it_is_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [chosen_device(setting) for setting in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [chosen_device(setting) for setting in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(ValueError, match="device: 'cuda' is asked for"):
        chosen_device("cuda")


@pytest.mark.parametrize(
    ("error", "short", "lost"),
    [
        (MemoryError(), True, False),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
            True,
            False,
        ),
        (RuntimeError("could not create a primitive"), True, True),  # oneDNN has a descriptor, and no room for its code
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False, False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False, True),
    ],
)
def test_an_error_says_that_memory_was_short_and_that_the_process_can_do_no_more(
    error: Exception, short: bool, lost: bool
) -> None:
    assert (allocation_failed(error), unfit(error)) == (short, lost)
