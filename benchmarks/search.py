"""Sixteen LoRA trials on SmolLM2 as a search: our service, Ray Tune with PEFT, Optuna with PEFT.

python benchmarks/search.py --only long|short|halving [--tokens N] [--batch 8] [--rounds N] [--seconds S]
    [--arms ARM ...] [--quick] [--json PATH]

The same trials, samples, order and seeds everywhere; a trial of the cell `long` trains 20,000 tokens, one of `short`
1,000, one of `halving` as many as a long one unless it is stopped at a rung. An arm has the machine to itself: it is
started, warmed, measured from the question to the last trial's end, and ended, arm after arm, round after round. What
is warm before: our service with an open pack; Ray for Tune, whose actors are part of the search; Optuna's process with
its model. Each rival runs in the fastest of its variants (dtype, trials at once), by trials of a tenth of the tokens; a
quick run takes the first. With `--seconds` nothing is begun after so many, with `--arms` only these arms are, and the
next run goes on from the record. Where rivals train some 100 tokens/s, as on two cores, a round of `short` takes a
quarter of an hour, one of `halving` about an hour and one of `long` nearly three, most of it the rivals'; with
`--tokens 5000` a quarter of that.
The claims against Tune are those against a process a trial; the arm that keeps process and model stands beside.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from math import inf, log10
from pathlib import Path

import machine
import numpy as np
from assignment import Task
from harness import Arm, ArmFailed, watched
from material import Material
from measure import decide
from over_http_servers import pss_of
from peft_table.measures import hypervolume
from record import Check, Gate, Head, Outcome, Record
from report import show
from rich.console import Console
from search_cells import ARMS, BESIDE, TOKENS, Cell
from search_service import Searching
from search_work import ROWS, TRIALS, Work, make
from servers import Server

QUICK_TOKENS, ROUNDS = 600, {"long": 1, "short": 5, "halving": 2}
_PROBED, _PROBE_SHARE = 4, 10
_PATIENCE_S = 4 * 3600.0
_WATCH_S = 1.0  # reading a tree's memory takes some itself
_HIGHEST = 10.8  # of SmolLM2's loss: that of chance
_GAINED, _ALIKE = 0.02, 0.1  # nine steps of one sample; a gain is a difference of two losses in bf16
_SAME = 2e-2  # the bare backbone's held-out loss, ours to PEFT's: eight bits of mantissa through thirty layers


@dataclass(frozen=True, slots=True)
class Now:
    """What of the record is to be filled in this run: these arms, and nothing is begun after `until`."""

    until: float
    arms: frozenset[str]


class Rival:
    """Tune or Optuna, in a child with children of its own."""

    def __init__(self, arm: Arm, variant: str, work: Work, *, jobs: range, steps: int) -> None:
        task = Task(arm.name, work.folder, machine.cores(), variant, tuple(jobs), steps)
        self._server = Server("search_rivals.py", task, _PATIENCE_S)

    def load(self) -> float | None:
        """What the bare backbone's held-out loss is by this arm, where it has one loaded."""
        found = self._server.ask("load").get("bare")
        return None if found is None else float(str(found))

    def check(self) -> float:
        """The held-out loss of the job that opens our pack, whose start it keeps in the work's folder."""
        return float(str(self._server.ask("check")["trained"]))

    def round(self) -> tuple[float, Mapping[int, float]]:
        """Seconds, and the held-out losses by trial."""
        found = self._server.ask("round")
        losses = found["losses"]
        assert isinstance(losses, dict)
        return float(str(found["stop"])) - float(str(found["start"])), {int(n): float(v) for n, v in losses.items()}

    def pss(self) -> int:
        return pss_of(self._server.pid)

    def close(self) -> None:
        self._server.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="search.py", description="Makespans of sixteen trials.")
    parser.add_argument("--only", choices=tuple(TOKENS), required=True, help="the cell")
    parser.add_argument("--tokens", type=int, help="of a trial, instead of the cell's")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a step; 8 has no goals")
    parser.add_argument("--rounds", type=int, help="of all arms")
    parser.add_argument("--seconds", type=float, default=inf, help="begin nothing new after so many")
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], help="these alone, for now")
    parser.add_argument("--quick", action="store_true", help="one round of few tokens: shows that it works")
    parser.add_argument("--json", type=Path, help="where to write the record; a run of the same code goes on from it")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # with the services that were started
    tokens = given.tokens or (QUICK_TOKENS if given.quick else TOKENS[given.only])
    cell = Cell(given.only, tokens, given.batch)
    rounds = given.rounds or (1 if given.quick else ROUNDS[cell.name])
    console = Console(width=None if sys.stdout.isatty() else 160)
    say = partial(Console(stderr=True).print, soft_wrap=True, highlight=False)
    record = Record.resume(_head(cell, rounds, quick=given.quick), given.json)
    with tempfile.TemporaryDirectory(prefix="polygraft-bench-") as name:
        now = Now(time.monotonic() + given.seconds, frozenset(given.arms or (arm.name for arm in cell.arms)))
        done = _measure(cell, Path(name), record, say, now)
    show(record, console)
    return 0 if done else 1


def _head(cell: Cell, rounds: int, *, quick: bool) -> Head:
    about = {arm.name: arm.about for arm in cell.arms}
    about |= {f"{arm.name} {what}": text for arm in cell.arms if not arm.limit for what, text in BESIDE.items()}
    return Head(
        benchmark=f"search.{cell.name}",
        quick=quick,
        rounds=rounds,
        shapes={
            "trials": TRIALS,
            "batch": cell.batch,
            "tokens a sequence": ROWS,
            "steps a trial": cell.steps,
            "tokens a trial": cell.steps * cell.batch * ROWS,
        },
        about=about,
        machine=machine.describe(),
        versions={**machine.versions(), **machine.versions_of(("ray", "optuna"))},
        commit=machine.commit(),
        sources=machine.sources(),
    )


def _measure(cell: Cell, folder: Path, record: Record, say: Callable[[str], None], now: Now) -> bool:
    """Do what the record lacks and can be begun in time; whether every claim holds. On a red gate nothing is timed."""
    with closing(Server("material.py", Task("make", str(folder), machine.cores()))) as maker:
        maker.ask("make")
    backbone = Path(Material.read(str(folder)).backbone)
    work = make(folder, backbone, steps=cell.steps, batch=cell.batch, halving=cell.name == "halving")
    if record.gate is None or not record.gate.holds:
        say("gate")
        record.gate = _gate(folder, work)
        record.save()
    if record.gate.holds:
        _time(cell, folder, work, record, say, now)
    decided = [decide(goal, record.samples) for goal in cell.goals]
    record.claims = [claim for claim in decided if claim.op is not None]
    record.figures = [claim for claim in decided if claim.op is None]
    record.save()
    return bool(record.claims) and all(claim.holds for claim in record.claims)


def _time(cell: Cell, folder: Path, work: Work, record: Record, say: Callable[[str], None], now: Now) -> None:
    """The arms' variants, then the rounds, arm after arm, each saved as soon as it is known."""
    arms = [arm for arm in cell.arms if arm.name in now.arms]
    for arm in arms:
        if arm.name not in record.arms:
            if time.monotonic() > now.until:
                return
            record.arms[arm.name] = _variant(arm, work, cell, say, quick=record.head.quick)
            record.save()
    for number in range(record.head.rounds):
        if number == len(record.samples):
            record.samples.append({})
        sample = record.samples[number]
        for arm in arms:
            if arm.name in sample or record.arms[arm.name].missing is not None:
                continue
            if time.monotonic() > now.until:
                return
            say(f"round {number + 1} of {record.head.rounds}, {arm.name}")
            try:
                sample |= _figures(arm, folder, work, record)
            except ArmFailed as error:
                record.arms[arm.name] = Outcome(missing=str(error))
            record.save()


def _gate(folder: Path, work: Work) -> Gate:
    """Whether both sides see the same text, by the bare backbone's held-out loss, and train alike, by that of a trial
    of a few steps from the same start."""
    try:
        with closing(Rival(_arm("optuna"), "float32 1", work, jobs=range(1), steps=1)) as theirs:
            bare, trained = theirs.load(), theirs.check()
        with closing(Searching(folder, work)) as ours:
            ours.warm()
    except ArmFailed as error:
        raise SystemExit(f"search: the gate could not be checked: {error}") from None
    assert bare is not None
    gain, ours_gain = bare - trained, ours.bare - ours.trained
    return Gate(
        (
            Check("held-out loss before training, nats by PEFT in float32", bare, _HIGHEST),
            Check("the same by our service, relative to it", abs(ours.bare / bare - 1), _SAME),
            Check("what a trial of a few steps gained by PEFT, nats", gain, _GAINED, least=True),
            Check("the same by our service, relative to it", abs(ours_gain / gain - 1), _ALIKE),
        )
    )


def _variant(arm: Arm, work: Work, cell: Cell, say: Callable[[str], None], *, quick: bool) -> Outcome:
    """The fastest by a few trials of few tokens; memory is read in the rounds."""
    if len(arm.variants) == 1 or quick:
        return Outcome(arm.variants[0], arm.variants[0])
    steps = max(9, cell.steps // _PROBE_SHARE)
    probes: dict[str, float] = {}
    for variant in arm.variants:
        say(f"{arm.name}, {variant}: {_PROBED} trials of {steps} steps")
        try:
            with closing(Rival(arm, variant, work, jobs=range(_PROBED), steps=steps)) as rival:
                rival.load()
                probes[variant] = _PROBED * steps * cell.batch * ROWS / rival.round()[0]
        except ArmFailed as error:
            return Outcome(missing=str(error))
    best = max(probes, key=lambda variant: probes[variant])
    return Outcome(best, best, probes)


def _figures(arm: Arm, folder: Path, work: Work, record: Record) -> Mapping[str, float]:
    """What a round of an arm gives, by the figures' names. Raises ArmFailed."""
    assert record.gate is not None
    if arm.limit:
        return {arm.name: _ceiling(folder)}
    outcome, begun = record.arms[arm.name], time.monotonic()
    with closing(_opened(arm, outcome.variant, folder, work)) as running:
        started, idle = time.monotonic() - begun, running.pss()
        with watched(running.pss, _WATCH_S) as highest:
            seconds, losses = running.round()
    record.arms[arm.name] = replace(outcome, idle_bytes=idle, peak_bytes=max(outcome.peak_bytes, *highest))
    record.arms |= {f"{arm.name} {what}": Outcome() for what in BESIDE}
    volume = _volume(work, losses, record.gate.checks[0].value)
    return {arm.name: work.tokens / seconds, f"{arm.name} start": started, f"{arm.name} volume": volume}


def _opened(arm: Arm, variant: str, folder: Path, work: Work) -> Rival | Searching:
    if arm.name == "ours":
        ours = Searching(folder, work)
        try:
            ours.warm()
        except BaseException:
            ours.close()
            raise
        return ours
    rival = Rival(arm, variant, work, jobs=range(TRIALS), steps=work.steps)
    rival.load()
    return rival


def _volume(work: Work, losses: Mapping[int, float], untrained: float) -> float:
    """Of the trials that ended, over loss and the logarithm of parameters, up to the loss before training and the
    largest trial."""
    points = [(loss, log10(work.trials[number].parameters)) for number, loss in losses.items()]
    reference = untrained, max(log10(trial.parameters) for trial in work.trials) + 0.01
    return float(hypervolume(np.array(points).reshape(-1, 2), reference))


def _ceiling(folder: Path) -> float:
    task = Task("ceiling", str(folder), machine.cores(), "auto", tuple(range(12)), 3, ours=True)
    with closing(Server("training_arms.py", task)) as server:
        server.ask("load")
        server.ask("warm")
        found = {name: float(str(value)) for name, value in server.ask("round").items()}
    return found["tokens"] / (found["stop"] - found["start"])


def _arm(name: str) -> Arm:
    return next(arm for arm in ARMS if arm.name == name)


if __name__ == "__main__":
    sys.exit(main())
