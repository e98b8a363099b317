"""The finished trials of a search as plain rows: for the report, for JSON, and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pydantic import JsonValue
from rich.markup import escape

from polygraft.launch.output import print_table
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
