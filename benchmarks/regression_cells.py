"""The cells of our own claims in one tree, for `regression.py`.

A line on stdin names a cell, its speed is a line on stdout. The benchmarks and the packages are those of the tree that
`PYTHONPATH` names.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import servers
from harness import Arm, Running, Stage
from machine import cores

TRAINING_STEPS = 8  # of each job in a round, whatever the tree's own number
task = servers.Task  # type: ignore[attr-defined]  # where it is defined differs from tree to tree


def main(folder: Path) -> None:
    with ExitStack() as stack:
        with closing(servers.Server("material.py", task("make", str(folder), cores()))) as maker:
            maker.ask("make")
        cells = {name: stack.enter_context(closing(running)) for name, running in opened(folder).items()}
        for running in cells.values():
            running.load()
            running.warm()
        print("ready", flush=True)
        for line in sys.stdin:
            print(cells[line.strip()].round(), flush=True)


def opened(folder: Path) -> Mapping[str, Running]:
    kernels, serving, training = map(benchmark, ("kernels", "serving", "training"))
    vars(training)["STEPS"] = TRAINING_STEPS
    stages: Mapping[str, tuple[Stage, tuple[Arm, ...], str, str]] = {
        "training": (training.TrainingStage(folder, quick=False), training.ARMS, "ours", "auto"),
        "serving": (serving.ServingStage(folder, quick=False), serving.ARMS, "ours", "auto"),
        "serving.bare": (serving.ServingStage(folder, quick=False), serving.ARMS, "ours_bare", "auto"),
        "kernels.decode": (kernels.KernelStage(folder, quick=False), kernels.ARMS, "ours_decode", "packed"),
        "kernels.chunk": (kernels.KernelStage(folder, quick=False), kernels.ARMS, "ours_chunk", "packed"),
    }
    return {
        cell: stage.open(next(arm for arm in arms if arm.name == name), variant)
        for cell, (stage, arms, name, variant) in stages.items()
    }


def benchmark(name: str) -> ModuleType:
    """The tree's benchmark, whose name may be that of a package which must not be imported."""
    path = Path(servers.__file__).with_name(f"{name}.py")
    spec = spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(Path(sys.argv[1]))
