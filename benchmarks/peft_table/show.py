"""What the replays say, as a page with two pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import spearmanr, ttest_ind  # type: ignore[import-untyped]

from peft_table.arms import SETTINGS, Arm, Setting
from peft_table.finals import Cost, Finals, costs
from peft_table.studies import COUNTS, TRAININGS, Studies, Study, key
from peft_table.table import Table

SAVED, STOPPED = 0.70, 0.05  # the goals
_REGRET, _VOLUME = 1, 2  # in a measurement, after what was spent
_SHOWN = (10, 20, 40)
_OURS, _THEIRS = "-", "--"


def write(table: Table, studies: Studies, finals: Finals, folder: Path) -> Path:
    """`report.md` and its pictures."""
    found = costs(table, studies, finals)
    lines = [
        "# Searches replayed on a table of learning curves",
        "",
        f"{len(table.rows)} configurations on {' and '.join(table.tasks)}: {table.about}.",
        "A study is told the validation loss of one seed; regret is by how much the row that it would choose is worse "
        "than the best of its space in the mean of all seeds, in nats; volume is its front's hypervolume, in shares of "
        "the whole space's. Means with 95% intervals over the studies. Where trials are stopped, what is lost is by "
        "how much the chosen one's loss is above the lowest that a trial would have come to; the share of studies is "
        "told that lost more than the standard deviation of a row's loss from one seed to the next.",
        "",
    ]
    lines += ["How far a row's loss says what it is worth (Spearman's rank correlation, mean of both seeds):", ""]
    lines += [*_agreement(table), ""]
    for setting in SETTINGS:
        lines += [f"## {setting.name}", ""]
        for task in table.tasks:
            lines += [f"{task}, studies of {setting.trials} trials:", ""]
            lines += [
                *(
                    _stops(table, studies, setting, task)
                    if "stopping" in setting.name
                    else _samplers(studies, setting, task)
                ),
                "",
            ]
    again = f"Trained again on new seeds: {', '.join(finals) or 'none'}."
    lines += ["## What stopping early saves and costs", "", again, ""]
    lines += [*_costs(found), "", *_verdicts(table, studies, found), ""]
    for name, draw in (("samplers.svg", _draw_samplers), ("stopping.svg", _draw_stops)):
        draw(table, studies).savefig(folder / name, metadata={"Date": None})
        lines += [f"![{name.removesuffix('.svg')}]({name})", ""]
    path = folder / "report.md"
    path.write_text("\n".join(lines))
    return path


def _agreement(table: Table) -> Iterator[str]:
    """Of losses at the end with those of the other seed, at half the steps, and in training's first parts."""
    shares = (1 / 9, 1 / 3, 2 / 3)
    yield from _head(["space", "task", "other seed", "validation at half", *(f"training to {s:.0%}" for s in shares)])
    for space in dict.fromkeys(row.space for row in table.rows):
        rows = table.of(space)
        for task, name in enumerate(table.tasks):
            half, end = (table.validation[rows, task, :, look] for look in (0, -1))
            curves = table.training[rows, task]
            parts = [half, *(curves[:, :, : round(table.steps(task) * share)].mean(axis=2) for share in shares)]
            said = [_ranks(end[:, 0], end[:, 1])]
            said += [fmean(_ranks(part[:, seed], end[:, seed]) for seed in range(end.shape[1])) for part in parts]
            yield _row([space, name, *(f"{value:.2f}" for value in said)])


def _ranks(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(spearmanr(one, other, nan_policy="omit").statistic)


def _samplers(studies: Studies, setting: Setting, task: str) -> Iterator[str]:
    heads = [f"{what} at {count}" for what in ("regret", "volume") for count in _SHOWN]
    yield from _head(["sampler", "studies", *heads])
    for arm, found in _arms(studies, setting, task):
        cells = [_mean(_at(found, count, part)) for part in (_REGRET, _VOLUME) for count in _SHOWN]
        yield _row([arm.name, f"{len(found)}", *cells])


def _stops(table: Table, studies: Studies, setting: Setting, task: str) -> Iterator[str]:
    noise = table.noise(setting.space, table.tasks.index(task))
    parts = {"regret": _REGRET, "volume": _VOLUME} if len(setting.objectives) > 1 else {"regret": _REGRET}
    heads = [f"{name} after {trainings} trainings" for name in parts for trainings in TRAININGS]
    lost = f"more than {noise:.3f} lost"
    yield from _head(["sampler, pruner", "studies", "saved", "best stopped", lost, *heads, "at the end"])
    for arm, found in _arms(studies, setting, task):
        stopped = [float(bool(study["stopped"])) for study in found]
        cells = [_mean(_after(found, place, part)) for part in parts.values() for place in range(len(TRAININGS))]
        beyond = fmean(float(str(study["lost"])) > noise for study in found)
        saved = [float(str(study["saved"])) for study in found]
        end = _mean([_numbers(study["end"])[_REGRET] for study in found])
        yield _row(
            [arm.name, f"{len(found)}", f"{fmean(saved):.1%}", f"{fmean(stopped):.0%}", f"{beyond:.0%}", *cells, end]
        )


def _costs(found: Mapping[str, Cost]) -> Iterator[str]:
    yield from _head(["setting, sampler, pruner", "studies", "saved", "test loss worse by", "at most (95%)", "p"])
    for name, cost in found.items():
        worse = [f"{cost.worse:+.4f}", f"{cost.at_most:+.4f}", f"{cost.p:.2f}"]
        yield _row([name.replace(" | ", ": "), f"{cost.studies}", f"{cost.saved:.1%}", *worse])


def _verdicts(table: Table, studies: Studies, found: Mapping[str, Cost]) -> Iterator[str]:
    """The goals, one a line."""
    for task in table.tasks:
        by_arm = {arm.name: _at(found, _SHOWN[-1], _VOLUME) for arm, found in _arms(studies, SETTINGS[0], task)}
        if len(by_arm.get("gp", ())) > 1 and "random" in by_arm:
            p = float(ttest_ind(by_arm["gp"], by_arm["random"], equal_var=False, alternative="greater").pvalue)
            gain = fmean(by_arm["gp"]) - fmean(by_arm["random"])
            said = f"- {task}: the Gaussian process has {gain:+.3f} of the hypervolume more than random search"
            yield f"{said} at {_SHOWN[-1]} trials ({len(by_arm['gp'])} studies, p = {p:.3f}, one-sided)"
    for setting in SETTINGS:
        if "stopping" not in setting.name:
            continue
        for arm in setting.arms:
            if arm.pruner != "early-exit":
                continue
            by_task = [[*studies.get(key(setting, task, arm), {}).values()] for task in table.tasks]
            noises = [table.noise(setting.space, task) for task in range(len(table.tasks))]
            beyond = [float(str(s["lost"])) > n for n, ones in zip(noises, by_task, strict=True) for s in ones]
            stopped = [bool(study["stopped"]) for ones in by_task for study in ones]
            cost = found.get(f"{setting.name} | {arm.name}")
            if stopped:
                goal = _goal(fmean(stopped) <= STOPPED, f"at most {STOPPED:.0%}")
                yield (
                    f"- {setting.name}, {arm.name}: the best was stopped in {fmean(stopped):.1%} of the studies{goal}; "
                    f"in {fmean(beyond):.1%} more was lost than a seed's noise"
                )
            if cost is not None:
                saved = _goal(cost.saved >= SAVED, f"at least {SAVED:.0%}")
                worse = f"{'is not shown to be' if cost.no_worse else 'is'} worse in {cost.studies} studies"
                name = f"{setting.name}, {arm.name}"
                yield f"- {name}: {cost.saved:.1%} of the samples saved{saved}; the chosen graft {worse}"


def _goal(holds: bool, what: str) -> str:
    return f" (goal {what}: {'holds' if holds else 'does not hold'})"


def _draw_samplers(table: Table, studies: Studies) -> Figure:
    """Regret and volume over trials, a column a setting and task."""
    settings = [(setting, task) for setting in SETTINGS if "stopping" not in setting.name for task in table.tasks]
    figure = Figure(figsize=(4 * len(settings), 7), layout="constrained")
    axes = figure.subplots(2, len(settings), squeeze=False)
    for column, (setting, task) in enumerate(settings):
        for row, (part, name) in enumerate(((_REGRET, "regret, nats"), (_VOLUME, "share of the hypervolume"))):
            for arm, found in _arms(studies, setting, task):
                style = _THEIRS if arm.sampler.startswith("optuna") else _OURS
                means = [fmean(_at(found, count, part)) for count in COUNTS]
                axes[row, column].plot(COUNTS, means, style, label=arm.name, linewidth=1.3)
            axes[row, column].set(xlabel="trials", ylabel=name, title=f"{setting.name}, {task}" if row == 0 else "")
            axes[row, column].grid(color="#e6eaee")
    axes[0, 0].legend(fontsize=7)
    return figure


def _draw_stops(table: Table, studies: Studies) -> Figure:
    """Regret at the end over the share of samples saved."""
    settings = [setting for setting in SETTINGS if "stopping" in setting.name]
    figure = Figure(figsize=(5 * len(settings), 4), layout="constrained")
    axes = figure.subplots(1, len(settings), squeeze=False)[0]
    for place, setting in zip(axes, settings, strict=True):
        for marker, task in zip("os^v", table.tasks, strict=False):
            for number, (arm, found) in enumerate(_arms(studies, setting, task)):
                saved = fmean(float(str(study["saved"])) for study in found)
                regret = fmean(_numbers(study["end"])[_REGRET] for study in found)
                place.plot(saved, regret, marker, color=f"C{number}", label=f"{arm.name} ({task})")
        place.set(xlabel="share of samples saved", ylabel="regret at the end, nats", title=setting.name)
        place.grid(color="#e6eaee")
    axes[0].legend(fontsize=6)
    return figure


def _arms(studies: Studies, setting: Setting, task: str) -> Iterator[tuple[Arm, list[Study]]]:
    for arm in setting.arms:
        if found := studies.get(key(setting, task, arm)):
            yield arm, list(found.values())


def _at(found: Sequence[Study], count: int, part: int) -> list[float]:
    return [_numbers(_list(study["trials"])[COUNTS.index(count)])[part] for study in found]


def _after(found: Sequence[Study], place: int, part: int) -> list[float]:
    """Of the studies that got so far."""
    after = [_list(study["tokens"])[place] for study in found]
    return [_numbers(one)[part] for one in after if one is not None]


def _mean(values: Sequence[float], show: Callable[[float], str] = "{:.3f}".format) -> str:
    if not values:
        return ""
    half = 1.96 * stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{show(fmean(values))} ± {show(half)}"


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


def _numbers(value: object) -> list[float]:
    return [float(str(one)) for one in _list(value)]


def _head(names: Sequence[str]) -> Iterator[str]:
    yield _row(names)
    yield _row(["---"] * len(names))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
