"""The Pareto front as a picture: held-out loss over trainable parameters, and which grafts the front is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_INK, _FRONT, _REST = "#222222", "#c2410c", "#94a3b8"


@dataclass(frozen=True, slots=True)
class Point:
    """A finished trial: what it minimised, and the graft it tried."""

    number: int
    parameters: int
    loss: float
    peft: str
    learning_rate: float


def draw(points: Sequence[Point], front: Sequence[Point], path: Path, *, title: str) -> None:
    """Write a PNG; `front` ascends in parameters. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9.0, 6.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    rest = [point for point in points if point not in front]
    axes.scatter([p.parameters for p in rest], [p.loss for p in rest], s=36, color=_REST, label="beaten in both objectives")
    axes.step([p.parameters for p in front], [p.loss for p in front], where="post", color=_FRONT, alpha=0.5, linewidth=1.2)
    axes.scatter([p.parameters for p in front], [p.loss for p in front], s=52, color=_FRONT, label="Pareto front", zorder=3)
    names = []
    for point in front:
        place = (point.parameters, point.loss)
        axes.annotate(f"#{point.number}", place, xytext=(6, 6), textcoords="offset points", fontsize=8, color=_INK)
        label = f"#{point.number}  {point.peft}, learning rate {point.learning_rate:g}: loss {point.loss:.3f}"
        names.append(Line2D([], [], linestyle="none", label=label))
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel("held-out loss")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.legend(handles=names, loc="outside lower left", frameon=False, fontsize=7.5, handlelength=0, handletextpad=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
