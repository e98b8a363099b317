"""What the benchmarks do as programs: options, a folder to work in, the run itself, the table and the exit code."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Protocol

import machine
from assignment import Task
from harness import ArmFailed, Stage, Study, measure
from record import Check, Gate, Head, Record
from report import show
from rich.console import Console
from servers import Server

ROUNDS, QUICK_ROUNDS = 5, 1
_WIDTH = 160  # of what goes to a file


class ProgramStage(Stage, Protocol):
    def close(self) -> None:
        """End what it started; the run is over."""
        ...


class OpenStage(Protocol):
    def __call__(self, folder: Path, *, quick: bool) -> ProgramStage: ...


def end_when_told() -> None:
    """On SIGTERM leave as on Ctrl-C, so that what was started is ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def carry_out(
    name: str,
    study_of: Callable[[int], Study],
    shapes: Mapping[str, int | str],
    open_stage: OpenStage,
    *,
    material: bool = True,
) -> int:
    """Run the benchmark `name` as the command line says; 1 when a claim does not hold or is not measured.

    With `material` the backbone, grafts and text lie in the stage's folder.
    """
    parser = argparse.ArgumentParser(prog=f"{name}.py", description="Interleaved arms, judged on ratios of one run.")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it works, proves nothing")
    parser.add_argument("--json", type=Path, help="where to write the record; a run of the same code goes on from it")
    given = parser.parse_args()
    end_when_told()
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    progress = partial(Console(stderr=True).print, soft_wrap=True, highlight=False)
    study = study_of(QUICK_ROUNDS if given.quick else ROUNDS)
    head = Head(
        benchmark=name,
        quick=given.quick,
        rounds=study.rounds,
        shapes=shapes,
        about={arm.name: arm.about for arm in study.arms},
        machine=machine.describe(),
        versions=machine.versions(),
        commit=machine.commit(),
        sources=machine.sources(),
    )
    record = Record.resume(head, given.json)
    if record.gate is None and given.json and given.json.exists():
        progress(f"{given.json} is of other code, versions, machine or options: starting afresh")
    with tempfile.TemporaryDirectory(prefix="polygraft-bench-") as folder:
        if material:
            with closing(Server("material.py", Task("make", folder, head.machine.cores))) as maker:
                progress("backbone, grafts and text")
                try:
                    maker.ask("make")
                except ArmFailed as error:
                    raise SystemExit(f"{name}: {error}") from None
        with closing(open_stage(Path(folder), quick=given.quick)) as stage:
            done = measure(study, stage, record, progress)
    show(record, console)
    return 0 if done else 1


def gate_of(script: str, task: Task) -> Gate:
    """What a gate script finds. Raises ArmFailed."""
    with closing(Server(script, task)) as server:
        found = server.ask("check")["checks"]
    assert isinstance(found, list)
    return Gate(tuple(Check(**check) for check in found))
