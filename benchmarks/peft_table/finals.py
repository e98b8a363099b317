"""What stopping early costs: the grafts that studies chose with and without it, trained again on seeds that no study
saw, and their losses on the test part compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from scipy.stats import ttest_1samp  # type: ignore[import-untyped]

from peft_table import backbone as own
from peft_table.arms import SETTINGS
from peft_table.make import curves, data_of
from peft_table.studies import Studies, key
from peft_table.table import Table
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.kernels.common.atomic import write_text

SEEDS = (11, 12, 13, 14, 15)
ALPHA = 0.05
PRUNER = "early-exit"  # the one whose cost is measured: training costs as much as the table itself, for every pruner

Finals = dict[str, dict[str, list[float]]]  # by task and row: a test loss a seed


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a pruner's studies beside those of the same sampler and seeds without it: the share of samples saved, how much
    worse (nats, test) the chosen graft is in the mean, the upper bound of that (one-sided, 95%), and how probable so
    much is if it is no worse."""

    saved: float
    worse: float
    at_most: float
    p: float
    studies: int

    @property
    def no_worse(self) -> bool:
        return self.p >= ALPHA


def retrain(table: Table, studies: Studies, folder: Path, path: Path, say: Callable[[str], None]) -> Finals:
    """Test losses of every row that a study with PRUNER, or without any, chose; saved in `path` task by task."""
    found: Finals = json.loads(path.read_text()) if path.exists() else {}
    files = own.make(folder / "backbone")
    backbone = Backbone.load(files, torch.float32, training=True)
    for task in table.tasks:
        wanted = {study["chosen"] for name, by in studies.items() for study in by.values() if _of(name, task)}
        missing = sorted(int(str(row)) for row in wanted if str(row) not in found.get(task, {}))
        if missing:
            say(f"{task}: {len(missing)} grafts again, {len(SEEDS)} seeds each")
            rows = [table.rows[number] for number in missing]
            data = data_of(files, task)
            tests = np.stack([curves(backbone, data, rows, [seed] * len(rows))[2] for seed in SEEDS], axis=1)
            for number, losses in zip(missing, tests.round(4).tolist(), strict=True):
                found.setdefault(task, {})[str(number)] = losses
            write_text(path, json.dumps(found) + "\n")
    return found


def costs(table: Table, studies: Studies, finals: Finals) -> Mapping[str, Cost]:
    """By setting and arm with a pruner, over all tasks."""
    result: dict[str, Cost] = {}
    for setting in SETTINGS:
        for arm in setting.arms:
            if arm.pruner != PRUNER:
                continue
            plain = next(one for one in setting.arms if one.sampler == arm.sampler and one.pruner == "none")
            worse: list[float] = []
            shares: list[float] = []
            for task in table.tasks:
                with_it, without = (studies.get(key(setting, task, one), {}) for one in (arm, plain))
                for seed in with_it.keys() & without.keys():
                    tests = [finals.get(task, {}).get(str(by[seed]["chosen"])) for by in (with_it, without)]
                    if all(tests):
                        worse.append(fmean(tests[0] or ()) - fmean(tests[1] or ()))
                        shares.append(float(str(with_it[seed]["saved"])))
            if worse:
                result[f"{setting.name} | {arm.name}"] = _cost(shares, worse)
    return result


def _cost(shares: Sequence[float], worse: Sequence[float]) -> Cost:
    mean = fmean(worse)
    if len(set(worse)) < 2:
        return Cost(fmean(shares), mean, mean, float(mean <= 0), len(worse))
    test = ttest_1samp(worse, 0.0, alternative="greater")
    bound = ttest_1samp(worse, 0.0, alternative="less").confidence_interval(1 - ALPHA).high
    return Cost(fmean(shares), mean, float(bound), float(test.pvalue), len(worse))


def _of(name: str, task: str) -> bool:
    """Whether a study's key is of a setting where trials are stopped, and of an arm that is compared."""
    setting, its, arm = name.split(" | ")
    return its == task and "stopping" in setting and arm.partition(", ")[2] in ("", PRUNER)
