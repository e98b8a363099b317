"""Replays every arm with every seed, study by study: what `studies.json` has already is not replayed again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import optuna

from peft_table.arms import SETTINGS, Arm, Setting
from peft_table.measures import after_tokens, after_trials, best_was_stopped, chosen, lost, saved
from peft_table.replay import View, replayed
from peft_table.table import SEEDS, Table
from polygraft.kernels.common.atomic import write_text

COUNTS = tuple(range(5, 41, 5))  # trials
TRAININGS = (5, 10, 15, 20)  # tokens, in whole trainings
_SAVE_S = 30.0

Study = Mapping[str, object]
Studies = dict[str, dict[str, Study]]  # by setting, task and arm; by seed


def key(setting: Setting, task: str, arm: Arm) -> str:
    return f"{setting.name} | {task} | {arm.name}"


def cells(table: Table, seeds: int | None = None) -> Iterator[tuple[Setting, int, Arm, int]]:
    """(setting, task, arm, seed), the first seeds of all before the later ones; at most so many `seeds` of each."""
    most = max(arm.seeds for setting in SETTINGS for arm in setting.arms)
    for seed in range(min(most, seeds or most)):
        for setting in SETTINGS:
            for task in range(len(table.tasks)):
                for arm in setting.arms:
                    if seed < arm.seeds:
                        yield setting, task, arm, seed


def measure(
    table: Table, path: Path, *, seconds: float, only: str, seeds: int | None, say: Callable[[str], None]
) -> Studies:
    """All studies whose key has `only` in it, as far as about so many `seconds` go; saved in `path` on the way."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found: Studies = json.loads(path.read_text()) if path.exists() else {}
    views = {
        (setting.space, task, seed): View(table, setting.space, task, seed)
        for setting in SETTINGS
        for task in range(len(table.tasks))
        for seed in range(len(SEEDS))
    }
    began = told = time.monotonic()
    for setting, task, arm, seed in cells(table, seeds):
        name = key(setting, table.tasks[task], arm)
        if only not in name or str(seed) in found.get(name, {}):
            continue
        if time.monotonic() - began > seconds:
            break
        found.setdefault(name, {})[str(seed)] = _study(
            views[setting.space, task, seed % len(SEEDS)], setting, arm, seed
        )
        if time.monotonic() - told > _SAVE_S:
            told = time.monotonic()
            say(f"seed {seed}, {name}")
            write_text(path, dumped(found))
    write_text(path, dumped(found))
    return found


def dumped(studies: Studies) -> str:
    """A line for every study."""
    arms = []
    for name, by_seed in sorted(studies.items()):
        lines = (f'  "{seed}": {json.dumps(study, separators=(",", ":"))}' for seed, study in by_seed.items())
        arms.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(arms) + "\n}\n"


def _study(view: View, setting: Setting, arm: Arm, seed: int) -> Study:
    sampler = arm.sampler_for(view, setting.objectives, setting.trials, seed)
    ran = replayed(view, sampler, setting.objectives, trials=setting.trials, pruner=arm.pruner_for())
    trials = [after_trials(view, ran, count) for count in COUNTS]
    tokens = [after_tokens(view, ran, trainings) for trainings in TRAININGS]
    return {
        "trials": [_short(asdict(one)) for one in trials],
        "tokens": [None if one is None else _short(asdict(one)) for one in tokens],
        "end": _short(asdict(after_trials(view, ran, len(ran)))),
        "saved": round(saved(view, ran), 4),
        "stopped": best_was_stopped(view, ran),
        "lost": round(lost(view, ran), 4),
        "chosen": int(view.numbers[chosen(view, ran)]),
    }


def _short(numbers: Mapping[str, float]) -> list[float]:
    return [round(value, 4) for value in numbers.values()]
