"""The order of a run: the gate, every arm alone, then all arms in turn, round after round; and what is claimed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Protocol

from measure import Claim, Goal, Quantity, Samples, all_hold, decide
from record import Gate, Outcome, Record

_WATCH_S = 0.2


class ArmFailed(Exception):
    """An arm cannot be measured; the message says why."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to do the work. The fastest of its variants is timed; a `limit` is no system, so its memory is not read."""

    name: str
    about: str
    variants: tuple[str, ...]
    limit: bool = False


class Running(Protocol):
    """An arm whose processes run. Its methods raise ArmFailed."""

    def load(self) -> str:
        """Load the bare backbone and use it once; returns the dtype."""
        ...

    def warm(self) -> None:
        """Build what rounds need and go through the work once."""
        ...

    def round(self) -> float:
        """Do the round's work; its figure, the higher the better."""
        ...

    def pss(self) -> int:
        """Bytes of all its processes now, pages they share with others split; what is gone has none. Never raises."""
        ...

    def close(self) -> None: ...


class Stage(Protocol):
    """Where arms run."""

    def check(self) -> Gate:
        """The correctness gate, in every dtype that is timed. Raises ArmFailed."""
        ...

    def open(self, arm: Arm, variant: str) -> Running: ...


@dataclass(frozen=True, slots=True)
class Study:
    """A benchmark, fixed before it runs; `read` are the bytes that a step of an arm reads, by computation."""

    arms: tuple[Arm, ...]
    goals: tuple[Goal, ...]
    rounds: int
    read: Mapping[str, float] = field(default_factory=dict)


def measure(study: Study, stage: Stage, record: Record, say: Callable[[str], None]) -> bool:
    """Do what `record` lacks, saving after each fact; whether all claims hold. On a red gate nothing is timed."""
    if record.gate is None or not record.gate.holds:
        say("gate")
        try:
            record.gate = stage.check()
        except ArmFailed as error:
            say(f"the gate could not be checked: {error}")
            record.gate = Gate(())
        record.save()
    if record.gate.holds:
        for arm in study.arms:
            if arm.name not in record.arms:
                say(f"{arm.name}, alone")
                record.arms[arm.name] = _alone(arm, stage)
                record.save()
        _time(study, stage, record, say)
    return _conclude(study, record)


def _alone(arm: Arm, stage: Stage) -> Outcome:
    """Memory of every variant while no other arm has a process (shared pages would be split), and the fastest."""
    found: dict[str, Outcome] = {}
    probes: dict[str, float] = {}
    try:
        for variant in arm.variants:
            with closing(stage.open(arm, variant)) as running:
                dtype = running.load()
                idle = 0 if arm.limit else running.pss()
                with watched(running.pss if not arm.limit else lambda: 0) as highest:
                    running.warm()
                probes[variant] = running.round()
                peak = 0 if arm.limit else max(*highest, running.pss())
                found[variant] = Outcome(dtype, variant, {}, idle, peak)
    except ArmFailed as error:
        return Outcome(missing=str(error))
    best = found[max(probes, key=lambda variant: probes[variant])]
    return Outcome(best.dtype, best.variant, probes, best.idle_bytes, best.peak_bytes)


@contextmanager
def watched(pss: Callable[[], int], every_s: float = _WATCH_S) -> Iterator[list[int]]:
    """The highest PSS while the context is open."""
    highest, over = [0], Event()

    def watch() -> None:
        while not over.wait(every_s):
            highest[0] = max(highest[0], pss())

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        over.set()
        thread.join()


def _time(study: Study, stage: Stage, record: Record, say: Callable[[str], None]) -> None:
    """The rounds that are missing, A B C A B C; an arm that fails is out, with all its samples."""
    if len(record.samples) >= study.rounds:
        return
    with ExitStack() as stack:
        running: dict[str, Running] = {}
        for arm in study.arms:
            if record.arms[arm.name].missing is None:
                say(f"{arm.name}, warm-up")
                try:
                    opened = stack.enter_context(closing(stage.open(arm, record.arms[arm.name].variant)))
                    opened.load()
                    opened.warm()
                    running[arm.name] = opened
                except ArmFailed as error:
                    record.arms[arm.name] = Outcome(missing=str(error))
        while len(record.samples) < study.rounds:
            sample: dict[str, float] = {}
            for name in list(running):
                say(f"round {len(record.samples) + 1} of {study.rounds}, {name}")
                try:
                    sample[name] = running[name].round()
                except ArmFailed as error:
                    record.arms[name] = Outcome(missing=str(error))
                    del running[name]
            record.samples.append(sample)
            record.save()


def _conclude(study: Study, record: Record) -> bool:
    claims: list[Claim] = []
    figures: list[Claim] = []
    memory = {name: float(arm.peak_bytes) for name, arm in record.arms.items() if arm.peak_bytes}
    samples: Mapping[Quantity, Samples] = {"speed": record.samples, "memory": [memory], "bytes read": [study.read]}
    for goal in study.goals:
        (figures if goal.op is None else claims).append(decide(goal, samples[goal.quantity]))
    record.claims, record.figures = claims, figures
    record.save()
    return all_hold(claims)
