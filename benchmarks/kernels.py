"""The branch op on CPU: rows of eight LoRA grafts through one layer's linears, against other ways to add them.

python benchmarks/kernels.py [--quick] [--json PATH]

Figures are rows a second through the layer. ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 measures a machine without AMX.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from assignment import Task
from harness import Arm, Running, Study
from machine import cores
from measure import Goal
from program import carry_out, gate_of
from record import Gate
from servers import Servers

ROWS = {"decode": 16, "chunk": 512}
PASSES, QUICK_PASSES = {"decode": 400, "chunk": 40}, {"decode": 100, "chunk": 10}  # of the layer in a round
SHARE = {"decode": 0.35, "chunk": 0.15}  # of the linears' own time that the branches may add

ABOUT = {
    "base": ("the linears alone, plain or prepacked", ("plain", "packed")),
    "own": ("the linears alone by the dense op", ("compiled",)),
    "least": ("the linears, then the grafts read and the results read and written once", ("plain", "packed")),
    "ours": ("the linears and the branch op", ("packed",)),
    "loop": ("the linears and a loop over the grafts", ("plain", "packed")),
    "grouped": ("the linears and torch.nn.functional.grouped_mm", ("plain", "packed")),
    "peft": ("PEFT's LoRA layers with adapter_names", ("plain",)),
    "roof": ("the work at the machine's bandwidth and flops, as measured", ("",)),
}
ARMS = tuple(
    Arm(f"{kind}_{name}", f"{rows} rows: {about}", variants, limit=True)
    for name, rows in ROWS.items()
    for kind, (about, variants) in ABOUT.items()
)
GOALS = tuple(
    goal
    for name, share in SHARE.items()
    for goal in (
        # Added time under a share of the linears' is a speed of at least 1 / (1 + share) times theirs.
        Goal(f"kernels.{name}.of_linears", "speed", f"ours_{name}", (f"base_{name}",), ">=", 1 / (1 + share)),
        Goal(
            f"kernels.{name}.of_rivals",
            "speed",
            f"ours_{name}",
            tuple(f"{kind}_{name}" for kind in ("loop", "grouped", "peft")),
            ">=",
            1.0,
        ),
        Goal(f"kernels.{name}.of_roof", "speed", f"ours_{name}", (f"roof_{name}",)),
        Goal(f"kernels.{name}.least_of_linears", "speed", f"least_{name}", (f"base_{name}",)),
        Goal(f"kernels.{name}.of_own_linears", "speed", f"ours_{name}", (f"own_{name}",)),
    )
)
SHAPES: Mapping[str, int | str] = {
    **{f"rows, {name}": rows for name, rows in ROWS.items()},
    "grafts": 8,
    "rank": 16,
    "layer": "SmolLM2-135M",
    "oneDNN up to": os.environ.get("ONEDNN_MAX_CPU_ISA", "all"),
}


class KernelStage:
    def __init__(self, folder: Path, *, quick: bool) -> None:
        self._folder, self._passes = str(folder), QUICK_PASSES if quick else PASSES

    def check(self) -> Gate:
        return gate_of("kernels_arms.py", self._task("gate", "", tuple(ROWS.values()), 1))

    def open(self, arm: Arm, variant: str) -> Running:
        kind, name = arm.name.split("_")
        return Servers("kernels_arms.py", [self._task(kind, variant, (ROWS[name],), self._passes[name])])

    def close(self) -> None: ...

    def _task(self, kind: str, variant: str, rows: tuple[int, ...], size: int) -> Task:
        return Task(kind, self._folder, cores(), variant, rows, size, ours=True)


if __name__ == "__main__":
    sys.exit(carry_out("kernels", lambda rounds: Study(ARMS, GOALS, rounds), SHAPES, KernelStage, material=False))
