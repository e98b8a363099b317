"""NOAH's search at its price: a supernet and evolution over its subnets, beside grafts trained each by itself.

python benchmarks/search_noah.py [--work FOLDER] [--seconds S] [--quick] [--json PATH]

On the table's backbone, for every task and seed: a supernet is trained, generations of its subnets are judged as they
lie in it, without a step of training, and the best is trained by itself; and each of some random grafts of the same
space is trained. Validation losses decide on both sides. The two that were found are trained again on five seeds that
no search saw, and judged on the test part. What a side costs is counted in rows that go forward, a row that is trained
on as three.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean

import kernels_elsewhere  # noqa: F401
import torch
from peft_table import backbone as own
from peft_table.make import BATCH, data_of
from peft_table.tasks import LONGEST, TASKS
from search_quality import RATES, Bench, best_of

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.elastic import cut
from polygraft.grafts.grammar import parse
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.kernels.common.atomic import write_text
from polygraft.trainers.evaluate import mean_loss
from polygraft.trainers.job import TrainConfig, TrainJob
from polygraft.trainers.runner import PackRunner
from polygraft.tuning.objectives import LOSS
from polygraft.tuning.request import one_rate
from polygraft.tuning.samplers.generations import Generations
from polygraft.tuning.spaces.supernets import noah
from polygraft.tuning.study import Result, Study

SIZES, GROUPS = (2, 4, 8, 16), 3
NET = f"lora(r=16) + serial(16, at=ffn.out) + prefix(16) + elastic(sizes={'|'.join(map(str, SIZES))}, groups={GROUPS})"
EPOCHS = 3  # of the supernet; a graft by itself has one
POPULATION, GENERATIONS = 8, 4
ALONE, AT_ONCE = 40, 20
WITHIN, COST = 0.01, 0.2  # the goals
SEEDS = (0, 1, 2, 3, 4)
_ROWS = 32 * BATCH * LONGEST  # of a forward
_TRAINED = 3  # passes of a row that is trained on: a backward takes two


def compared(bench: Bench, seed: int) -> Mapping[str, object]:
    """What both sides found, its tests, and what it cost, in rows."""
    space = one_rate(noah(bench.backbone.shape, sizes=SIZES, depths=GROUPS, learning_rate=RATES))
    net, values = _supernet(bench, space.learning_rate.low, seed)
    study = Study(space, (LOSS,), Generations(space.parameters, POPULATION, seed))
    for _ in range(GENERATIONS):
        for trial in [study.ask() for _ in range(POPULATION)]:
            graft = BoundGraft(parse(trial.candidate.peft), bench.backbone.shape)
            lies = {name: values[whole] for name, whole in cut(graft, net).items()}
            own_part = {tensor.name: lies[tensor.name][: tensor.shape[0]].clone() for tensor in graft.tensors}
            loss = mean_loss(bench.backbone, graft, own_part, bench.data.validation, _ROWS)
            study.tell(trial.number, Result(values=(loss,)))
    alone = bench.searched(space, "random", ALONE, seed, at_once=AT_ONCE)
    found, best = best_of(study), best_of(alone)
    tests = bench.tested([found, best])
    trained, judged = _TRAINED * len(bench.data.train), len(bench.data.validation)
    return {
        "found": found.peft,
        "alone": best.peft,
        "tests": tests,
        "rows": [trained * (EPOCHS + 1) + judged * POPULATION * GENERATIONS, (trained + judged) * ALONE],
    }


def _supernet(bench: Bench, rate: float, seed: int) -> tuple[BoundGraft, Mapping[str, torch.Tensor]]:
    runner = PackRunner(bench.backbone, max_rows=_ROWS)
    graft = BoundGraft(parse(NET), bench.backbone.shape)
    config = TrainConfig(epochs=EPOCHS, batch_size=BATCH, learning_rate=rate, seed=seed, micro_rows=_ROWS)
    running = runner.admit(TrainJob("net", graft, config, bench.data.train))
    while not running.finished:
        failed = runner.step().failed
        assert not failed, failed
    return graft, running.slab.tensors


def main() -> int:
    parser = argparse.ArgumentParser(prog="search_noah.py", description="A supernet's search at its price.")
    parser.add_argument("--work", type=Path, default=Path("reports/peft_table"), help="where the backbone lies")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many")
    parser.add_argument("--quick", action="store_true", help="one seed of each task: shows that it works")
    parser.add_argument("--json", type=Path, default=Path("reports/search-noah.json"))
    given = parser.parse_args()
    say = partial(print, flush=True)
    found: dict[str, Mapping[str, object]] = json.loads(given.json.read_text()) if given.json.exists() else {}
    files = own.make(given.work / "backbone")
    backbone = Backbone.load(files, torch.float32, training=True)
    began = time.monotonic()
    left = [(task, seed) for seed in SEEDS[: 1 if given.quick else None] for task in TASKS]
    for task, seed in left:
        name = f"{task} {seed}"
        if name not in found and time.monotonic() - began < given.seconds:
            start = time.monotonic()
            found[name] = compared(Bench(backbone, data_of(files, task)), seed)
            given.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(given.json, json.dumps(found, indent=1) + "\n")
            say(f"{name}: {time.monotonic() - start:.0f} s")
    for line in told(found):
        say(line)
    return 0 if all(f"{task} {seed}" in found for task, seed in left) else 1


def told(found: Mapping[str, Mapping[str, object]]) -> list[str]:
    """A line a search: how much worse the subnet's test loss is, in shares of the other's, and what it cost."""
    lines = []
    for name, cell in found.items():
        ours, alone = (fmean(losses) for losses in _lists(cell["tests"]))
        rows = _numbers(cell["rows"])
        cost = rows[0] / rows[1]
        worse = ours / alone - 1
        holds = "holds" if worse <= WITHIN and cost <= COST else "does not hold"
        goal = f"goal {WITHIN:.0%}, {COST:.0%}: {holds}"
        lines.append(f"{name}: {worse:+.2%} of the loss for {cost:.0%} of the cost ({goal})")
    return lines


def _lists(value: object) -> list[list[float]]:
    assert isinstance(value, list)
    return value


def _numbers(value: object) -> list[float]:
    assert isinstance(value, list)
    return value


if __name__ == "__main__":
    sys.exit(main())
