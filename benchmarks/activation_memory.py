"""What a training step of LoRA-FA takes for activations beside LoRA's: what is held between forward and backward, and
the most that the step takes at any time.

python benchmarks/activation_memory.py [--quick] [--json PATH]

Bytes are those that the C library's allocator has given out, asked after every operation: no processor's speed has a
part in them, and a run repeats the last one's but for what other threads of the library take.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine
import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone, best_dtype
from polygraft.grafts.runtime.pretrained import EMBEDDED, materialise
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.kernels.common.atomic import write_text
from polygraft.launch.cache import backbone_cache

JOBS, RANK, ROWS = 4, 16, 128  # of every job
ARMS = {"lora": f"lora(r={RANK})", "lora-fa": f"lora-fa(r={RANK})"}
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Taken:
    """Bytes beyond those before a step: held between its forward and its backward, and at the highest."""

    held: int
    peak: int


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33 and later."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def given_out() -> int:
    """Bytes that the allocator has given out and not got back."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Mallinfo
    found = library.mallinfo2()
    return int(found.uordblks + found.hblkhd)


class Highest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most that was given out after any operation inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, given_out())
        return result


def taken(backbone: Backbone, text: str, rows: int) -> Taken:
    """By the second of two steps alike: the first one leaves what is made once."""
    graft = BoundGraft(parse(text), backbone.shape)
    residents = [
        Resident(str(job), graft, initialise(graft, backbone, seed=job, samples=[[1, 2, 3]])) for job in range(JOBS)
    ]
    stacks = backbone.stacks(residents, trainable=True)
    _step(backbone, stacks, rows)
    return _step(backbone, stacks, rows)


def _step(backbone: Backbone, stacks: Stacks, rows: int) -> Taken:
    sequences = tuple((job * rows, rows) for job in range(JOBS))
    spans = tuple(Span(first, first + count, job) for job, (first, count) in enumerate(sequences))
    batch = Rows(torch.arange(JOBS * rows) % 1000, torch.arange(rows).repeat(JOBS), spans)
    for leaf in stacks.leaves():
        leaf.grad = None
    before = given_out()
    with Highest() as highest:
        hidden = backbone.forward(batch, stacks, WholeSequences(sequences, backbone.shape))
        held = given_out() - before
        hidden.backward(torch.ones_like(hidden))  # type: ignore[no-untyped-call]
    return Taken(held, highest.bytes - before)


def report(found: Mapping[str, Taken], console: Console) -> None:
    table = Table(title="activations of a step", title_justify="left")
    for column in ("arm", "held MiB", "peak MiB"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, one in found.items():
        table.add_row(name, f"{one.held / MIB:.1f}", f"{one.peak / MIB:.1f}")
    console.print(table)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args(arguments)
    rows = ROWS // 4 if given.quick else ROWS
    backbone = Backbone.load(materialise(EMBEDDED, backbone_cache()), best_dtype(), training=True)
    found = {name: taken(backbone, text, rows) for name, text in ARMS.items()}
    console = Console()
    console.print(f"{EMBEDDED} in {backbone.dtype}, {JOBS} jobs of {rows} rows, rank {RANK} at all projections")
    report(found, console)
    ratios = {kind: getattr(found["lora-fa"], kind) / getattr(found["lora"], kind) for kind in ("held", "peak")}
    holds = all(ratio < 1 for ratio in ratios.values())
    console.print(f"LoRA-FA's over LoRA's: {', '.join(f'{kind} {ratio:.3f}' for kind, ratio in ratios.items())}")
    if given.json:
        claims = [
            {"id": f"lora-fa {kind}", "value": ratio, "unit": "of lora's", "goal": 1, "op": "<", "holds": ratio < 1}
            for kind, ratio in ratios.items()
        ]
        record = {
            "benchmark": "activation_memory",
            "quick": given.quick,
            "machine": asdict(machine.describe()),
            "versions": dict(machine.versions()),
            "commit": machine.commit(),
            "dtype": str(backbone.dtype),
            "arms": {name: asdict(one) for name, one in found.items()},
            "claims": claims,
        }
        write_text(given.json, json.dumps(record, indent=1))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
