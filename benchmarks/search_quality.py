"""Whether searching pays at equal cost: on the table's backbone, three tasks, five seeds.

python benchmarks/search_quality.py [--work FOLDER] [--seconds S] [--quick] [--only PART] [--json PATH]

`defaults`: an AutoPEFT-style search of 24 trials, within the parameters of LoRA r=8 at queries and values, against as
many trials that tune the learning rates of LoRA r=8, a parallel adapter and a prefix of the same size; the lowest
validation loss decides on both sides. `stages`: S4's staged search; of every stage the best design beside the median
one, and the last design beside the best of as many random ones. What is compared is trained again on five seeds that no
search saw, and judged on the test part. (The Gaussian process against random search is in the table's report.)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import fmean, median_low, stdev

import kernels_elsewhere  # noqa: F401
import numpy as np
import torch
from peft_table import backbone as own
from peft_table.make import Data, curves, data_of
from peft_table.table import LONGEST_PREFIX, S4_BUDGET, Row
from peft_table.tasks import TASKS
from scipy.stats import t, ttest_1samp  # type: ignore[import-untyped]

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.sites import ModelShape
from polygraft.kernels.common.atomic import write_text
from polygraft.tuning.objectives import LOSS
from polygraft.tuning.samplers.choose import sampler
from polygraft.tuning.samplers.staged import S4_STAGES
from polygraft.tuning.space import Candidate, Rates, count
from polygraft.tuning.spaces.autopeft import autopeft
from polygraft.tuning.spaces.kinds import AnySpace
from polygraft.tuning.spaces.s4 import s4_space
from polygraft.tuning.study import Failure, Result, Study

SEARCHES = (0, 1, 2, 3, 4)  # seeds
FINALS = (11, 12, 13, 14, 15)
TRIALS, AT_ONCE = 24, 8
PER_STAGE = 8
RATES = Rates(1e-3, 3e-2)
LORA = "lora(r=8, at=attn.[qv])"
ALPHA = 0.05

Tests = list[float]  # a test loss for every seed of FINALS


@dataclass(frozen=True, slots=True)
class Bench:
    backbone: Backbone
    data: Data

    def validated(self, candidates: Sequence[Candidate], seed: int) -> list[float]:
        """Validation losses after training, all in one pack."""
        return [
            float(loss)
            for loss in curves(self.backbone, self.data, _rows(candidates), [seed] * len(candidates))[1][:, -1]
        ]

    def tested(self, candidates: Sequence[Candidate]) -> list[Tests]:
        """Test losses of each, trained again on every seed of FINALS."""
        rows = _rows(candidates)
        found = [curves(self.backbone, self.data, rows, [seed] * len(rows))[2] for seed in FINALS]
        return [[round(float(loss), 4) for loss in losses] for losses in np.stack(found, axis=1)]

    def searched(self, space: AnySpace, model: str, trials: int, seed: int, at_once: int = AT_ONCE) -> Study:
        """A study of loss alone, so many trials at once."""
        proposer = sampler(model, space, (LOSS,), trials=trials, startup=at_once, seed=seed)  # type: ignore[arg-type]
        study = Study(space, (LOSS,), proposer)
        while len(study.trials) < trials:
            asked = [study.ask() for _ in range(min(at_once, trials - len(study.trials)))]
            losses = self.validated([trial.candidate for trial in asked], seed)
            for trial, loss in zip(asked, losses, strict=True):
                finite = np.isfinite(loss)
                study.tell(trial.number, Result(values=(loss,)) if finite else Failure(reason="not finite"))
        return study


def defaults(bench: Bench, seed: int) -> Mapping[str, object]:
    """A search and the tuned defaults with one seed: what each chose, and its tests."""
    shape = bench.backbone.shape
    most = count(LORA, shape)
    space = autopeft(shape, longest=LONGEST_PREFIX, learning_rate=RATES, most=most)
    study = bench.searched(space, "tpe", TRIALS, seed)
    found = best_of(study)
    fixed = [
        Candidate(peft, float(f"{rate:.1e}"), count(peft, shape))
        for peft in (LORA, _largest("parallel({})", most, shape), _largest("prefix({})", most, shape))
        for rate in np.geomspace(RATES.low, RATES.high, TRIALS // 3)
    ]
    losses = bench.validated(fixed, seed)
    best = fixed[int(np.nanargmin(losses))]
    tests = bench.tested([found, best])
    return {"searched": _said(found, tests[0]), "fixed": _said(best, tests[1])}


def stages(bench: Bench, seed: int) -> Mapping[str, object]:
    """S4's search with one seed: of every stage the best and the median design, the last one, and random search's."""
    space = s4_space(bench.backbone.shape, most=S4_BUDGET, learning_rate=RATES)
    trials = PER_STAGE * len(S4_STAGES)
    study = bench.searched(space, "staged", trials, seed)
    chance = bench.searched(space, "random", trials, seed)
    pairs: list[Candidate] = []
    for stage in range(len(S4_STAGES)):
        own_trials = [one for one in study.trials[stage * PER_STAGE :][:PER_STAGE] if one.loss is not None]
        middle = median_low(one.loss for one in own_trials if one.loss is not None)
        pairs.append(min(own_trials, key=lambda one: one.loss or 0.0).candidate)
        pairs.append(next(one for one in own_trials if one.loss == middle).candidate)
    last = min((one for one in study.trials[-PER_STAGE:] if one.loss is not None), key=lambda one: one.loss or 0.0)
    tests = bench.tested([*pairs, last.candidate, best_of(chance)])
    return {
        "best": tests[:-2:2],
        "median": tests[1:-2:2],
        "last": _said(last.candidate, tests[-2]),
        "random": _said(best_of(chance), tests[-1]),
    }


PARTS = {"defaults": defaults, "stages": stages}


def main() -> int:
    parser = argparse.ArgumentParser(prog="search_quality.py", description="Searches at equal cost.")
    parser.add_argument("--work", type=Path, default=Path("reports/peft_table"), help="where the backbone lies")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many")
    parser.add_argument("--quick", action="store_true", help="one task, one seed: shows that it works")
    parser.add_argument("--only", choices=tuple(PARTS), help="one of the two comparisons")
    parser.add_argument("--json", type=Path, default=Path("reports/search-quality.json"))
    given = parser.parse_args()
    say = partial(print, flush=True)
    found: dict[str, Mapping[str, object]] = json.loads(given.json.read_text()) if given.json.exists() else {}
    files = own.make(given.work / "backbone")
    backbone = Backbone.load(files, torch.float32, training=True)
    began = time.monotonic()
    tasks, seeds = (("trivia",), (0,)) if given.quick else (tuple(TASKS), SEARCHES)
    parts = tuple(PARTS) if given.only is None else (given.only,)
    left = [f"{part} {task} {seed}" for seed in seeds for part in parts for task in tasks]
    for name in left:
        if name not in found and time.monotonic() - began < given.seconds:
            part, task, seed = name.split()
            start = time.monotonic()
            found[name] = PARTS[part](Bench(backbone, data_of(files, task)), int(seed))
            given.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(given.json, json.dumps(found, indent=1) + "\n")
            say(f"{name}: {time.monotonic() - start:.0f} s")
    for line in told(found):
        say(line)
    return 0 if all(name in found for name in left) else 1


def told(found: Mapping[str, Mapping[str, object]]) -> list[str]:
    """What is claimed and with which interval; a line each. Differences are of test losses in nats; below 0 the search
    is the better one."""
    lines = []
    for task in dict.fromkeys(name.split()[1] for name in found):
        own_cells = {name: cell for name, cell in found.items() if name.split()[1] == task}
        gaps = [
            _gap(cell["searched"], cell["fixed"]) for name, cell in own_cells.items() if name.startswith("defaults")
        ]
        if gaps:
            lines.append(f"{task}: AutoPEFT's space against the best fixed default: {_interval(gaps)}")
        staged = [cell for name, cell in own_cells.items() if name.startswith("stages")]
        if not staged:
            continue
        for stage, names in enumerate(S4_STAGES):
            gaps = [fmean(_tests(cell["best"])[stage]) - fmean(_tests(cell["median"])[stage]) for cell in staged]
            lines.append(f"{task}: S4's stage {stage + 1} ({names[0]}), best against median: {_interval(gaps)}")
        gaps = [_gap(cell["last"], cell["random"]) for cell in staged]
        lines.append(f"{task}: S4's last design against random search's best: {_interval(gaps)}")
    return lines


def _interval(gaps: Sequence[float]) -> str:
    if len(gaps) < 2:
        return f"{gaps[0]:+.4f} (one search)"
    half = float(t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / sqrt(len(gaps))
    p = float(ttest_1samp(gaps, 0.0, alternative="less").pvalue) if len(set(gaps)) > 1 else 1.0
    verdict = "better" if p < ALPHA else "not shown to be better"
    return f"{fmean(gaps):+.4f} ± {half:.4f} over {len(gaps)} searches, p = {p:.3f}: {verdict}"


def best_of(study: Study) -> Candidate:
    """With the lowest loss."""
    return min((one for one in study.trials if one.loss is not None), key=lambda one: one.loss or 0.0).candidate


def _largest(form: str, most: int, shape: ModelShape) -> str:
    """The largest size within so many parameters."""
    size = 1
    while count(form.format(size + 1), shape) <= most:
        size += 1
    return form.format(size)


def _rows(candidates: Sequence[Candidate]) -> list[Row]:
    return [Row("", {}, one.peft, one.learning_rate, one.parameters) for one in candidates]


def _said(candidate: Candidate, tests: Tests) -> dict[str, object]:
    return {
        "peft": candidate.peft,
        "learning_rate": candidate.learning_rate,
        "parameters": candidate.parameters,
        "tests": tests,
    }


def _gap(one: object, other: object) -> float:
    assert isinstance(one, Mapping) and isinstance(other, Mapping)
    return fmean(one["tests"]) - fmean(other["tests"])


def _tests(value: object) -> list[Tests]:
    assert isinstance(value, list)
    return value


if __name__ == "__main__":
    sys.exit(main())
