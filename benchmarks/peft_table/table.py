"""The table as data: configurations of AutoPEFT's and S4's spaces, and what training each came to, on every task with
every seed.

`rows.jsonl` has the configurations, a line each, `table.npz` the numbers; a NaN is a number that training did not
come to.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc  # type: ignore[import-untyped]

from polygraft.grafts.sites import ModelShape
from polygraft.tuning.space import Rates
from polygraft.tuning.spaces.autopeft import autopeft
from polygraft.tuning.spaces.kinds import AnySpace
from polygraft.tuning.spaces.parameters import Config, InvalidConfig, at_shares
from polygraft.tuning.spaces.s4 import s4_space

HERE = Path(__file__).resolve().parent
SPACES = ("autopeft", "s4")
ROWS = {"autopeft": 64, "s4": 64}
SEEDS = (1, 2)
RATES = Rates(1e-3, 1e-2)  # one decade
LONGEST_PREFIX, S4_BUDGET = 16, 12_000
LOOKS = 2  # validations of a curve, evenly, the last at its end

Numbers = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Row:
    """A configuration and the graft that it means."""

    space: str
    config: Config
    peft: str
    learning_rate: float
    parameters: int


@dataclass(frozen=True, slots=True)
class Table:
    """Axes: rows, tasks, seeds, and steps of `training` or looks of `validation`; losses of a weighted token, natural
    logarithms. `untrained` is the backbone's validation loss by task, `tokens` what a step of a task trains on
    the mean. `about` says what made it."""

    about: str
    shape: ModelShape
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    training: Numbers
    validation: Numbers
    test: Numbers
    untrained: Numbers
    tokens: Numbers

    def steps(self, task: int) -> int:
        """Of the optimiser, of every job on the task."""
        return int(np.isfinite(self.training[:, task]).any(axis=(0, 1)).sum())

    def noise(self, space: str, task: int) -> float:
        """The standard deviation of a row's validation loss from one seed to the next, over the space's rows."""
        ends = self.validation[self.of(space), task, :, -1]
        return float(np.sqrt(np.nanmean(ends.var(axis=1, ddof=1))))

    def of(self, space: str) -> NDArray[np.intp]:
        """Numbers of the space's rows."""
        return np.flatnonzero([row.space == space for row in self.rows])


def space_of(name: str, shape: ModelShape) -> AnySpace:
    """Learning rates within one decade in both."""
    if name == "s4":
        return s4_space(shape, most=S4_BUDGET, learning_rate=RATES)
    return autopeft(shape, longest=LONGEST_PREFIX, learning_rate=RATES)


def drawn(name: str, shape: ModelShape, count: int, seed: int = 0) -> tuple[Row, ...]:
    """So many different configurations: those of Latin hypercubes, one after the other, that mean a graft."""
    space = space_of(name, shape)
    hypercube = qmc.LatinHypercube(len(space.parameters), seed=seed)
    found: dict[str, Row] = {}
    for _ in range(100):
        for shares in hypercube.random(count):
            config = at_shares(space.parameters, map(float, shares))
            try:
                candidate = space.candidate(config)
            except InvalidConfig:
                continue
            row = Row(name, config, candidate.peft, candidate.learning_rate, candidate.parameters)
            found.setdefault(f"{row.peft} {row.learning_rate}", row)
            if len(found) == count:
                return tuple(found.values())
    raise AssertionError(f"{name} has {len(found)} grafts, not {count}")


def save(table: Table, folder: Path = HERE) -> None:
    lines = [json.dumps(asdict(row)) for row in table.rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    np.savez_compressed(
        folder / "table.npz",
        about=np.array(table.about),
        shape=np.array(json.dumps(asdict(table.shape))),
        tasks=np.array(table.tasks),
        training=table.training.astype(np.float32),
        validation=table.validation.astype(np.float32),
        test=table.test.astype(np.float32),
        untrained=table.untrained.astype(np.float32),
        tokens=table.tokens.astype(np.float32),
    )


def load(folder: Path = HERE) -> Table:
    """Raises FileNotFoundError where there is none."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    with np.load(folder / "table.npz", allow_pickle=False) as found:
        numbers = {name: found[name].astype(np.float32) for name in ("training", "validation", "test")}
        return Table(
            about=str(found["about"]),
            shape=ModelShape(**json.loads(str(found["shape"]))),
            tasks=tuple(map(str, found["tasks"])),
            rows=tuple(Row(**row) for row in rows),
            untrained=found["untrained"],
            tokens=found["tokens"],
            **numbers,
        )
