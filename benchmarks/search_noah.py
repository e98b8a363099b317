"""NOAH's search at its price: a supernet and evolution over its subnets, beside grafts trained each by itself.

python benchmarks/search_noah.py [--work FOLDER] [--seconds S] [--quick] [--json PATH]

On the table's backbone, for every task and seed: a supernet is trained, generations of its subnets are judged as they
lie in it, without a step of training (`supernet`); and random grafts of the same space are trained each by itself
(`alone`). Validation losses decide on both sides. The two that were found are trained again on five seeds that no
search saw, and judged on the test part (`tests`). What a side costs is counted in rows that go forward, a row that is
trained on as three; the supernet's side pays for training what it found, too. Each part is kept once it is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import fmean, median, stdev

import kernels_elsewhere  # noqa: F401
import machine
import torch
from peft_table import backbone as own
from peft_table.make import BATCH, data_of
from peft_table.tasks import LONGEST, TASKS
from scipy.stats import t  # type: ignore[import-untyped]
from search_quality import FINALS, RATES, Bench, best_of

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
from polygraft.tuning.space import Candidate
from polygraft.tuning.spaces.kinds import AnySpace
from polygraft.tuning.spaces.supernets import noah
from polygraft.tuning.study import Result, Study

SIZES, GROUPS = (2, 4, 8, 16), 3
NET = f"lora(r=16) + serial(16, at=ffn.out) + prefix(16) + elastic(sizes={'|'.join(map(str, SIZES))}, groups={GROUPS})"
EPOCHS = 3  # of the supernet; a graft by itself has one
POPULATION, GENERATIONS = 8, 4
ALONE, AT_ONCE = 40, 20
WITHIN, COST = 0.01, 0.2  # the goals
SEEDS = (0, 1, 2, 3, 4)
PARTS = ("supernet", "alone", "tests")
_ROWS = 32 * BATCH * LONGEST  # of a forward
_TRAINED = 3  # passes of a row that is trained on: a backward takes two

Part = Mapping[str, object]
Cell = dict[str, Part]


def space_of(bench: Bench) -> AnySpace:
    """NOAH's, at the middle of the learning rates."""
    return one_rate(noah(bench.backbone.shape, sizes=SIZES, depths=GROUPS, learning_rate=RATES))


def supernet(bench: Bench, seed: int, cell: Cell) -> Part:
    """The subnet that evolution finds, and what its judge, the trained supernet, said of all."""
    space = space_of(bench)
    net, values = _taught(bench, space.learning_rate.low, seed)
    study = Study(space, (LOSS,), Generations(space.parameters, POPULATION, seed))
    for _ in range(GENERATIONS):
        for trial in [study.ask() for _ in range(POPULATION)]:
            graft = BoundGraft(parse(trial.candidate.peft), bench.backbone.shape)
            lies = {name: values[whole] for name, whole in cut(graft, net).items()}
            part = {tensor.name: lies[tensor.name][: tensor.shape[0]].clone() for tensor in graft.tensors}
            loss = mean_loss(bench.backbone, graft, part, bench.data.validation, _ROWS)
            study.tell(trial.number, Result(values=(loss,)))
    return _found(study)


def alone(bench: Bench, seed: int, cell: Cell) -> Part:
    """The best of random grafts of the space, each of which is trained."""
    return _found(bench.searched(space_of(bench), "random", ALONE, seed, at_once=AT_ONCE))


def tests(bench: Bench, seed: int, cell: Cell) -> Part:
    """Test losses of both, trained again on every seed of FINALS, and what each side cost, in rows."""
    both = [_candidate(cell[part]["found"]) for part in PARTS[:2]]
    trained, judged = _TRAINED * len(bench.data.train), len(bench.data.validation)
    return {
        "losses": bench.tested(both),
        "rows": [trained * (EPOCHS + 1) + judged * POPULATION * GENERATIONS, (trained + judged) * ALONE],
    }


def _found(study: Study) -> Part:
    return {"found": asdict(best_of(study)), "losses": [one.loss for one in study.trials]}


def _taught(bench: Bench, rate: float, seed: int) -> tuple[BoundGraft, Mapping[str, torch.Tensor]]:
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
    files = own.make(given.work / "backbone")
    backbone = Backbone.load(files, torch.float32, training=True)
    about = {
        "machine": asdict(machine.describe()),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "backbone": backbone.fingerprint,
        "supernet": NET,
        "shapes": f"{EPOCHS} epochs, {GENERATIONS} generations of {POPULATION}; {ALONE} alone, tests {FINALS}",
    }
    kept = json.loads(given.json.read_text()) if given.json.exists() else {}
    found: dict[str, Cell] = kept.get("cells", {})
    began = time.monotonic()
    seeds = SEEDS[:1] if given.quick else SEEDS
    left = [(f"{task} {seed}", task, seed, part) for seed in seeds for task in TASKS for part in PARTS]
    for name, task, seed, part in left:
        cell = found.setdefault(name, {})
        if part not in cell and time.monotonic() - began < given.seconds and (part != PARTS[-1] or len(cell) == 2):
            start = time.monotonic()
            cell[part] = {"supernet": supernet, "alone": alone, "tests": tests}[part](
                Bench(backbone, data_of(files, task)), seed, cell
            )
            given.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(given.json, json.dumps({"about": about, "cells": found}, indent=1) + "\n")
            say(f"{name}, {part}: {time.monotonic() - start:.0f} s")
    whole = {name: cell for name, cell in found.items() if PARTS[-1] in cell}
    for line in told(whole):
        say(line)
    return 0 if all(name in whole for name, *_ in left) else 1


def told(cells: Mapping[str, Cell]) -> list[str]:
    """A line a search: how much worse the subnet's test loss is, in shares of the other's, what it cost, and how much
    worse the median of the random grafts is, in validation loss; and one for all, where there are several."""
    lines, gaps, costs = [], [], []
    for name, cell in cells.items():
        ours, others = (fmean(losses) for losses in _lists(cell["tests"]["losses"]))
        rows, judged = _lists([cell["tests"]["rows"], cell["alone"]["losses"]])
        gaps.append(ours / others - 1)
        costs.append(rows[0] / rows[1])
        middle = median(judged) / min(judged) - 1
        lines.append(
            f"{name}: test loss {ours:.3f} and {others:.3f}, {gaps[-1]:+.2%} for {costs[-1]:.1%} of the cost "
            f"(the median graft by itself {middle:+.2%} in validation loss)"
        )
    if len(gaps) > 1:
        most = fmean(gaps) + float(t.ppf(0.95, len(gaps) - 1)) * stdev(gaps) / sqrt(len(gaps))
        verdict = "holds" if most <= WITHIN and max(costs) <= COST else "is not shown"
        lines.append(
            f"in the mean of {len(gaps)} searches {fmean(gaps):+.2%}, at most {most:+.2%} (one-sided, 95%), for "
            f"at most {max(costs):.1%} of the cost: goal {WITHIN:.0%} and {COST:.0%}, {verdict}"
        )
    return lines


def _lists(value: object) -> list[list[float]]:
    assert isinstance(value, list)
    return value


def _candidate(value: object) -> Candidate:
    assert isinstance(value, dict)
    return Candidate(**value)


if __name__ == "__main__":
    sys.exit(main())
