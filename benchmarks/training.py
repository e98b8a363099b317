"""Eight LoRA jobs on SmolLM2: one pack of ours, against PEFT one after the other, two at a time, and switching.

python benchmarks/training.py [--quick] [--json PATH]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from assignment import Task
from harness import Arm, Running, Study
from machine import cores
from material import GRAFT, GRAFTS, TRAIN_TOKENS
from measure import Goal
from program import carry_out, gate_of
from record import Gate
from servers import Servers

TYPES = ("bfloat16", "float32")  # a PEFT arm is timed in the faster
STEPS, QUICK_STEPS = 10, 1  # optimiser steps of each job: a round outlasts a passing disturbance

ARMS = (
    Arm("ours", "one pack: the jobs share every forward and backward", ("auto",)),
    Arm("peft_in_turn", "PEFT and AdamW, one process, one job after the other", TYPES),
    Arm("peft_two_processes", "PEFT and AdamW, two processes at a time, four jobs each, half the cores each", TYPES),
    Arm("peft_switching", "PEFT and AdamW, one process, one backbone, set_adapter before each step", TYPES),
    Arm("ceiling", "the backbone's products alone, forward and backward, at the pack's rows", ("auto",), limit=True),
)
PEFT = ("peft_in_turn", "peft_two_processes", "peft_switching")
GOALS = (
    Goal("training.speed", "speed", "ours", ("peft_two_processes",), ">=", 2.2),
    Goal("training.speed", "speed", "ours", ("ceiling",), ">=", 0.6),  # or so much of what the products allow
    Goal("training.memory", "memory", "ours", ("peft_two_processes",), "<", 1.0),
    Goal("training.over_peft", "speed", "ours", PEFT),
)
SHAPES: Mapping[str, int | str] = {
    "jobs": GRAFTS,
    "graft": GRAFT,
    "batch": 1,
    "tokens": TRAIN_TOKENS,
    "optimiser": "AdamW",
    "steps a round": STEPS,
    "steps a quick round": QUICK_STEPS,
}


class TrainingStage:
    def __init__(self, folder: Path, *, quick: bool) -> None:
        self._folder, self._steps = str(folder), QUICK_STEPS if quick else STEPS

    def check(self) -> Gate:
        return gate_of("training_gate.py", self._task("gate", "", range(GRAFTS), cores()))

    def open(self, arm: Arm, variant: str) -> Running:
        jobs, threads = range(GRAFTS), cores()
        match arm.name:
            case "peft_two_processes":
                half = max(1, threads // 2)
                tasks = [self._task("in_turn", variant, part, half) for part in (jobs[::2], jobs[1::2])]
            case name:
                tasks = [self._task(_KINDS[name], variant, jobs, threads)]
        return Servers("training_arms.py", tasks)

    def close(self) -> None: ...

    def _task(self, kind: str, variant: str, jobs: range, threads: int) -> Task:
        return Task(kind, self._folder, threads, variant, tuple(jobs), self._steps, ours=kind == "packed")


_KINDS = {"ours": "packed", "peft_in_turn": "in_turn", "peft_switching": "switching", "ceiling": "ceiling"}

if __name__ == "__main__":
    sys.exit(carry_out("training", lambda rounds: Study(ARMS, GOALS, rounds), SHAPES, TrainingStage))
