"""The pictures of a report beside the front: best so far, every trial, what mattered, what each layer got."""

from __future__ import annotations

from math import log10

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from polygraft.grafts.sites import ModelShape
from polygraft.tuning.report.summary import Report, by_layer, importances
from polygraft.tuning.report.summary import history as falls
from polygraft.tuning.study import Stopped

_INK, _SOFT, _GRID = "#1f2933", "#697586", "#e6eaee"
_FRONT, _OTHER, _STOPPED = "#0f766e", "#a9b7c4", "#b45309"
_AXES = 12  # of the parallel coordinates
_BARS = 12


def history(report: Report) -> Figure:
    """Every trial's loss, the lowest so far, and the trials that were stopped at the last loss they reported."""
    figure, axes = _figure()
    done = [(trial.number, trial.loss) for trial in report.trials if trial.loss is not None]
    axes.scatter(
        [n for n, _ in done], [loss for _, loss in done], s=34, color=_OTHER, zorder=2, label="trained to its end"
    )
    stopped = [(t.number, t.outcome.loss) for t in report.trials if isinstance(t.outcome, Stopped)]
    if stopped:
        numbers, losses = zip(*stopped, strict=True)
        axes.scatter(numbers, losses, s=34, marker="x", color=_STOPPED, zorder=2, label="stopped (training loss)")
    best = falls(report.trials)
    ends = [*best, (len(report.trials) - 1, best[-1][1])]
    axes.step(
        [n for n, _ in ends], [loss for _, loss in ends], where="post", color=_FRONT, linewidth=2, label="best so far"
    )
    axes.set_xlabel("trial", color=_INK)
    axes.set_ylabel("held-out loss", color=_INK)
    axes.legend(frameon=False, labelcolor=_SOFT)
    return figure


def parallel(report: Report) -> Figure:
    """Parallel coordinates: a line a trial, over the parameters that mattered most and the loss; the front in
    colour."""
    figure, axes = _figure()
    done = [trial for trial in report.trials if trial.loss is not None]
    names = [*list(importances(report.trials))[: _AXES - 1], "loss"]
    spans: dict[str, tuple[float, float]] = {}

    def value(name: str, number: int) -> float | None:
        trial = report.trials[number]
        found = trial.loss if name == "loss" else trial.config.get(name)
        return log10(found) if found is not None and name == "learning_rate" else found

    for name in names:
        values = [v for trial in done if (v := value(name, trial.number)) is not None]
        spans[name] = (min(values), max(values))
    for trial in sorted(done, key=lambda trial: trial.number in report.front):
        points = [
            (index, 0.5 if high == low else (v - low) / (high - low))
            for index, name in enumerate(names)
            if (v := value(name, trial.number)) is not None
            for low, high in (spans[name],)
        ]
        on_front = trial.number in report.front
        color, width, alpha = (_FRONT, 2.0, 0.9) if on_front else (_OTHER, 1.0, 0.6)
        axes.plot([x for x, _ in points], [y for _, y in points], color=color, linewidth=width, alpha=alpha)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks([0, 1], ["lowest", "highest"])
    return figure


def importance(report: Report) -> Figure:
    figure, axes = _figure()
    found = list(importances(report.trials).items())[:_BARS][::-1]
    axes.barh([name for name, _ in found], [share for _, share in found], color=_FRONT)
    axes.set_xlim(0, 1)
    return figure


def layers(report: Report, shape: ModelShape) -> Figure:
    """Trainable parameters of every layer, a line for each trial of the front."""
    figure, axes = _figure()
    for number in report.front:
        counts = by_layer(report.trials[number].candidate.peft, shape)
        (line,) = axes.step(range(shape.layers), counts, where="mid", linewidth=1.3, label=f"trial {number}")
        if number == report.chosen:
            line.set(color=_FRONT, linewidth=2.4)
    axes.set_xlabel("layer", color=_INK)
    axes.set_ylabel("trainable parameters", color=_INK)
    axes.legend(frameon=False, labelcolor=_SOFT, fontsize=8)
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, 4.2), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure, axes
