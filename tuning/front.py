"""Draws a search: each trial's held-out loss over its trainable parameters, the Pareto front, and the grafts on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import log10
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from polygraft.tuning.study import Result, Trial, TrialState, pareto

_INK, _SOFT, _GRID = "#1f2933", "#697586", "#e6eaee"
_FRONT, _OTHER, _BEFORE = "#0f766e", "#a9b7c4", "#b45309"
_ROWS = 10  # grafts that are spelled out next to the plot

Points = Sequence[tuple[float, float]]  # (loss, parameters)


def draw(
    trials: Sequence[Trial],
    path: Path,
    *,
    front: Sequence[Trial] | None = None,
    title: str = "Which graft for which budget",
) -> None:
    """Write a PNG of loss over parameters; `front` is that of the trials' values when not given. Raises ValueError when
    no trial is complete."""
    done = [_point(trial) for trial in trials if trial.state is TrialState.COMPLETE]
    if not done:
        raise ValueError(f"trials: none of {len(trials)} is complete, so there is nothing to draw")
    front = pareto(trials) if front is None else front
    figure = Figure(figsize=(12, 6.4), dpi=150, facecolor="white")
    axes = figure.add_axes((0.072, 0.112, 0.535, 0.716))
    _plot(axes, done, [_point(trial) for trial in front])
    _baseline(axes, trials)
    _name_in_plot(axes, front)
    figure.text(0.02, 0.945, title, fontsize=17, fontweight="bold", color=_INK)
    figure.text(0.02, 0.9, _summary(trials, front), fontsize=10.5, color=_SOFT)
    _key(figure.add_axes((0.628, 0.03, 0.365, 0.83)), front)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _plot(axes: Axes, done: Points, front: Points) -> None:
    losses, sizes = zip(*done, strict=True)
    margin = 10 ** (0.06 * max(log10(max(sizes) / min(sizes)), 1))
    left, right = min(sizes) / margin, max(sizes) * margin
    spread = max(losses) - min(losses)
    room = max(0.1 * spread, 0.004 * max(losses))
    axes.set(xscale="log", xlim=(left, right), ylim=(min(losses) - room, max(losses) + room))
    x = [size for _, size in front] + [right]
    y = [loss for loss, _ in front] + [front[-1][0]]
    # Right of and above the line something on the front is as small and as good.
    axes.fill_between(x, y, axes.get_ylim()[1] + 10 * room, step="post", color=_FRONT, alpha=0.055, linewidth=0)
    axes.step(x, y, where="post", color=_FRONT, linewidth=1.8, alpha=0.75, zorder=2)
    rest = [point for point in done if point not in front]
    axes.scatter(
        [size for _, size in rest], [loss for loss, _ in rest], s=62, color=_OTHER, edgecolor="white", zorder=3
    )
    for number, (loss, size) in enumerate(front, 1):
        _disc(axes, (size, loss), number, small=len(front) > _ROWS // 2)
    _axis(axes)


def _axis(axes: Axes) -> None:
    axes.set_xlabel("trainable parameters", color=_INK, fontsize=11, labelpad=7)
    axes.set_ylabel("held-out loss", color=_INK, fontsize=11, labelpad=8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _short(size)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(color=_GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT, labelsize=9.5, length=0, which="both", pad=6)
    for side in axes.spines.values():
        side.set_visible(False)


def _disc(axes: Axes, at: tuple[float, float], number: int, *, small: bool = False) -> None:
    """The number of a graft on the front; where two overlap the later one lies above."""
    axes.scatter(
        *at, s=190 if small else 260, color=_FRONT, edgecolor="white", linewidth=1.5, zorder=4 + number, clip_on=False
    )
    axes.annotate(
        str(number),
        at,
        ha="center",
        va="center_baseline",
        color="white",
        fontsize=8.3 if small else 9.5,
        fontweight="bold",
        zorder=4 + number,
    )


def _name_in_plot(axes: Axes, front: Sequence[Trial]) -> None:
    """The unions below and left of their points, where no trial can lie; the key names those that have no room here."""
    left = axes.transAxes.transform((0, 0))[0]
    above = float("inf")
    for trial in front:
        loss, size = _point(trial)
        x, y = axes.transData.transform((size, loss))
        if above - y < 40:  # pixels
            continue
        above = y
        name = _words(trial.candidate.peft)[0]
        if x - left > 11 * len(name) + 40:
            _note(axes, name, (size, loss), shift=(-14, -8), ha="right", va="center", color=_FRONT)
        else:
            _note(axes, name, (size, loss), shift=(-9, -16), ha="left", va="center", color=_FRONT)


def _baseline(axes: Axes, trials: Sequence[Trial]) -> None:
    """A line at the loss before training, unless it is so far away that the trials would become one heap."""
    before = _before(trials)
    low, high = axes.get_ylim()
    if before is None or before > high + 1.2 * (high - low):
        return
    axes.set_ylim(low, max(high, before + 0.06 * (before - low)))
    axes.axhline(before, color=_BEFORE, linewidth=1.3, linestyle=(0, (5, 4)), zorder=1)
    text = f"backbone without a graft, {before:.3f}"
    _note(axes, text, (axes.get_xlim()[1], before), shift=(-6, 5), ha="right", va="baseline", color=_BEFORE)


def _note(  # noqa: PLR0913
    axes: Axes,
    text: str,
    at: tuple[float, float],
    *,
    shift: tuple[float, float],
    ha: Literal["left", "right"],
    va: Literal["center", "baseline"],
    color: str,
) -> None:
    """Text next to a point, `shift` points of the printer's kind away."""
    axes.annotate(text, at, xytext=shift, textcoords="offset points", ha=ha, va=va, color=color, fontsize=9.3)


def _key(axes: Axes, front: Sequence[Trial]) -> None:
    """The grafts on the front, from the smallest up, under the numbers they have in the plot."""
    axes.set(xlim=(0, 1), ylim=(_ROWS + 0.1, -0.6))
    axes.axis("off")
    axes.text(0.03, -0.32, "Best for its size", fontsize=11, fontweight="bold", color=_INK, va="center")
    for row, trial in enumerate(front[:_ROWS]):
        loss, size = _point(trial)
        graft, where = _words(trial.candidate.peft)
        _disc(axes, (0.055, row + 0.38), row + 1)
        axes.text(0.115, row + 0.22, graft, fontsize=10.3, color=_INK, va="center")
        columns = ((0.115, f"loss {loss:.3f}"), (0.282, _short(size)), (0.388, _rate(trial)), (0.565, where))
        for x, fact in columns:
            axes.text(x, row + 0.58, fact, fontsize=8.8, color=_SOFT, va="center")
    if len(front) > _ROWS:
        axes.text(0.115, _ROWS + 0.05, f"and {len(front) - _ROWS} larger ones", fontsize=8.8, color=_SOFT, va="center")


def _summary(trials: Sequence[Trial], front: Sequence[Trial]) -> str:
    failed = sum(trial.state is TrialState.FAILED for trial in trials)
    before = _before(trials)
    parts = [
        f"{len(trials)} trial{'s' * (len(trials) > 1)}" + (f", {failed} of them failed" if failed else ""),
        f"{len(front)} on the front",
    ]
    if before is not None:
        best = min(_point(trial)[0] for trial in front)
        parts.append(f"held-out loss from {before:.3f} before training to {best:.3f}")
    return "   ·   ".join(parts)


def _point(trial: Trial) -> tuple[float, float]:
    assert trial.loss is not None
    return trial.loss, float(trial.candidate.parameters)


def _before(trials: Sequence[Trial]) -> float | None:
    known = (trial.outcome.loss_before for trial in trials if isinstance(trial.outcome, Result))
    return next((loss for loss in known if loss is not None), None)


def _words(peft: str) -> tuple[str, str]:
    """The union, and its layers on their own where all of its terms have the same ones."""
    layers = set(re.findall(r"@([0-9,-]+)", peft))
    if len(layers) > 1 or (layers and peft.count("@") != peft.count("(")):
        return peft, ""
    where = f"layers {layers.pop()}" if layers else "all layers"
    return re.sub(r"@[0-9,-]+", "", peft), where.replace("-", "–").replace(",", ", ")


def _short(size: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{size / unit:.3g}{name}"
    return f"{size:.0f}"


def _rate(trial: Trial) -> str:
    mantissa, _, exponent = f"{trial.candidate.learning_rate:.1e}".partition("e")
    return f"rate {mantissa}e{int(exponent)}"
