"""The finished trials of a search as plain rows: for the report, for JSON, and as a table; and which one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pydantic import JsonValue
from rich.markup import escape

from polygraft.cluster.searches import RemoteSearch
from polygraft.launch.output import print_table, screen
from polygraft.tuning.study import Trial


@dataclass(frozen=True, slots=True)
class Point:
    """A trial that has values: what it minimised, and the graft it tried."""

    trial: int
    loss: float
    parameters: int
    peft: str
    learning_rate: float

    @staticmethod
    def of(trial: Trial) -> Point:
        loss, what = trial.loss, trial.candidate
        assert loss is not None, f"trial {trial.number} has no values"
        return Point(trial.number, loss, what.parameters, what.peft, what.learning_rate)

    def to_json(self) -> dict[str, JsonValue]:
        return asdict(self)


def print_front(front: Sequence[Point]) -> None:
    print_table(
        ("#trial", "#loss", "#parameters", "method", "#learning rate"),
        ((p.trial, f"{p.loss:.4f}", f"{p.parameters:,}", escape(p.peft), f"{p.learning_rate:g}") for p in front),
        empty="no trial has finished",
    )


def print_chosen(search: RemoteSearch) -> None:
    """The member that was chosen of those that were trained again, if there is one."""
    if search.chosen is None:
        return
    again = next(member for member in search.finals if member.trial == search.chosen)
    interval = f" ± {again.half_width:.4f}" if again.seeds > 1 else ""
    seeds = "another seed" if again.seeds == 1 else f"{again.seeds} other seeds"
    chosen = f"chosen: trial {again.trial}, loss {again.loss:.4f}{interval} on {seeds}"
    for name, found in (("score", again.score), ("test loss", again.test_loss), ("test score", again.test_score)):
        chosen += "" if found is None else f", {name} {found.mean:.4f} ± {found.half_width:.4f}"
    screen.print(chosen, highlight=False)
