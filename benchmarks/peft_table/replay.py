"""A search replayed on the table: the study, its sampler and pruner are the product's; only training is looked up.

Trials run a few at a time, as in a pack: all of them take a step together, and a new one starts where one ends. A
proposal means the nearest row of the space that the study has not tried, and it is that row's configuration that
the sampler is told of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heappop, heappush
from math import log

import numpy as np
from numpy.typing import NDArray

from peft_table.table import Row, Table, space_of
from polygraft.tuning.objectives import Objective
from polygraft.tuning.pruners.curves import Pruner
from polygraft.tuning.pruners.watch import Watch
from polygraft.tuning.spaces.kinds import AnySpace
from polygraft.tuning.spaces.parameters import Choice, Config, LogUniform, Parameter, filled
from polygraft.tuning.study import Failure, NotYet, Outcome, Result, Sampler, Study, Trial

CONCURRENCY = 4  # trials at once: a plan's own number


@dataclass(frozen=True)
class View:
    """What a study sees of the table: the rows of one space on one task with one seed."""

    table: Table
    space_name: str
    task: int
    seed: int

    @cached_property
    def space(self) -> AnySpace:
        return space_of(self.space_name, self.table.shape)

    @cached_property
    def numbers(self) -> NDArray[np.intp]:
        """Of the rows in the table."""
        return self.table.of(self.space_name)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(self.table.rows[number] for number in self.numbers)

    @cached_property
    def training(self) -> NDArray[np.float32]:
        """Losses by (row, step)."""
        return np.asarray(self.table.training[self.numbers, self.task, self.seed, : self.table.steps(self.task)])

    @cached_property
    def loss(self) -> NDArray[np.float32]:
        """What the study is told: the validation loss at a row's end."""
        return np.asarray(self.table.validation[self.numbers, self.task, self.seed, -1])

    @cached_property
    def truth(self) -> NDArray[np.float32]:
        """What a row is worth: its validation loss in the mean of all seeds."""
        return np.asarray(self.table.validation[self.numbers, self.task, :, -1].mean(axis=1))

    @cached_property
    def points(self) -> NDArray[np.float64]:
        """The rows where they lie in the space."""
        return np.stack([place(self.space.parameters, row.config) for row in self.rows])

    @cached_property
    def by_config(self) -> dict[frozenset[tuple[str, int | float]], int]:
        return {frozenset(row.config.items()): number for number, row in enumerate(self.rows)}

    def row_of(self, trial: Trial) -> int:
        return self.by_config[frozenset(trial.config.items())]


def place(parameters: Sequence[Parameter], config: Config) -> NDArray[np.float64]:
    """Coordinates in which the squared distance of two configurations is the sum over their parameters: of a number,
    its share of the range, squared; of a choice, 1 where it differs; and 1 where only one of them has it."""
    found: list[float] = []
    values = filled(parameters, config)
    for parameter in parameters:
        there = parameter.name in config
        found.append(0.0 if there else 1.0)
        match parameter:
            case Choice(name=name, count=count):
                found += [0.5**0.5 * (there and values[name] == number) for number in range(count)]
            case LogUniform(name=name, low=low, high=high):
                found.append(log(values[name] / low) / log(high / low))
            case _:
                found.append((values[parameter.name] - parameter.low) / max(parameter.high - parameter.low, 1))
    return np.array(found)


@dataclass(frozen=True, slots=True)
class Nearest:
    """A sampler whose proposals are rows that were not tried."""

    inner: Sampler
    view: View

    def propose(self, trials: Sequence[Trial], attempt: int) -> Config:
        point = place(self.view.space.parameters, self.inner.propose(trials, attempt))
        distances = np.square(self.view.points - point).sum(axis=1)
        distances[[self.view.row_of(trial) for trial in trials]] = np.inf
        return self.view.rows[int(distances.argmin())].config


@dataclass(frozen=True, slots=True)
class Ran:
    """A trial as it went: on which row, from which time on (in steps of the pack), after how many steps it ended, and
    whether that was its end."""

    row: int
    began: int
    steps: int
    complete: bool

    @property
    def ended(self) -> int:
        return self.began + self.steps


@dataclass(slots=True)
class _Running:
    trial: Trial
    row: int
    began: int
    looks: tuple[int, ...]
    seen: int = 0  # looks


@dataclass(slots=True)
class Replay:
    """One study on a view; `ran` are its trials in the order in which they ended."""

    view: View
    study: Study
    pruner: Pruner | None
    ran: list[Ran] = field(default_factory=list)
    _watch: Watch | None = None
    _agenda: list[tuple[int, int, _Running]] = field(default_factory=list)
    _free: int = 0  # places of the pack

    def go(self, trials: int, concurrency: int = CONCURRENCY) -> tuple[Ran, ...]:
        self._watch = None if self.pruner is None else Watch(self.pruner, (), {})
        self._free = concurrency
        self._fill(0, trials)
        while self._agenda:
            now, _, running = heappop(self._agenda)
            outcome = self._look(running)
            if outcome is None:
                self._push(running)
                continue
            told = self.study.tell(running.trial.number, outcome)
            if self._watch is not None:
                self._watch.ended(told)
            steps = running.looks[running.seen - 1]
            self.ran.append(Ran(running.row, running.began, steps, told.values is not None))
            self._free += 1
            self._fill(now, trials)
        return tuple(self.ran)

    def _fill(self, now: int, trials: int) -> None:
        """Start what there are places for; a sampler that waits for others is asked again when the next one ends."""
        while self._free and len(self.study.trials) < trials:
            try:
                trial = self.study.ask()
            except NotYet:
                return
            self._free -= 1
            self._start(trial, now)

    def _start(self, trial: Trial, now: int) -> None:
        total = self.view.training.shape[1]
        looks = (total,) if self.pruner is None else self.pruner.looks(trial.number, total)
        self._push(_Running(trial, self.view.row_of(trial), now, looks))

    def _push(self, running: _Running) -> None:
        heappush(self._agenda, (running.began + running.looks[running.seen], running.trial.number, running))

    def _look(self, running: _Running) -> Outcome | None:
        """What the trial comes to at its next look; None: it goes on."""
        before = running.looks[running.seen - 1] if running.seen else 0
        running.seen += 1
        now, total = running.looks[running.seen - 1], running.looks[-1]
        values = self._values(running.row)
        losses = self.view.training[running.row, before:now]
        if not np.isfinite(losses).all():
            return Failure(reason="a training loss is not finite")
        curve: tuple[float, ...] = ()
        if self._watch is not None:
            known = tuple(v for o, v in zip(self.study.objectives, values, strict=True) if o.known)
            self._watch.see(running.trial, known, dict(enumerate(losses.tolist(), before + 1)), total)
            stopped = self._watch.judge(running.trial, total)
            if stopped is not None:
                return stopped
            curve = self._watch.curve(running.trial.number)
        if now < total:
            return None
        if not np.isfinite(values).all():
            return Failure(reason="the loss is not finite")
        return Result(values=values, curve=curve)

    def _values(self, row: int) -> tuple[float, ...]:
        found = {"loss": float(self.view.loss[row]), "parameters": float(self.view.rows[row].parameters)}
        return tuple(found[objective.name] for objective in self.study.objectives)


def replayed(
    view: View,
    sampler: Sampler,
    objectives: Sequence[Objective],
    *,
    trials: int,
    pruner: Pruner | None = None,
    concurrency: int = CONCURRENCY,
) -> tuple[Ran, ...]:
    """A study of so many trials, as they went."""
    if trials > len(view.rows):
        raise ValueError(f"trials: {trials} of {len(view.rows)} rows")
    study = Study(view.space, objectives, Nearest(sampler, view))
    return Replay(view, study, pruner).go(trials, concurrency)
