"""The other end of a server: reads commands from its input and answers each on the pipe it was given."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

import kernels_elsewhere  # noqa: F401
from assignment import Task

Reply = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Round:
    """Useful tokens, and when the work on them began and ended, in seconds of a clock that all processes share."""

    tokens: int
    start: float
    stop: float


class Worker(Protocol):
    """An arm's half of `harness.Running`."""

    def load(self) -> str: ...

    def warm(self) -> None: ...

    def round(self) -> Round: ...


def timed(do: Callable[[], int]) -> Round:
    """A round that is all of `do`, which returns its tokens."""
    start = time.monotonic()
    tokens = do()
    return Round(tokens, start, time.monotonic())


def task() -> Task:
    """What this process was started for."""
    given = json.loads(sys.argv[1])
    return Task(**{**given, "jobs": tuple(given["jobs"])})


def work(worker: Worker) -> None:
    """Answer as an arm until the input ends."""

    def load() -> Reply:
        return {"dtype": worker.load()}

    def warm() -> Reply:
        worker.warm()
        return {}

    answer({"load": load, "warm": warm, "round": lambda: asdict(worker.round())})


def answer(commands: Mapping[str, Callable[[], Reply]]) -> None:
    """Answer until the input ends; an exception is the answer to its command and is traced in the log."""
    with os.fdopen(int(sys.argv[2]), "w") as replies:
        for line in sys.stdin:
            try:
                reply = commands[line.strip()]()
            except Exception as error:
                traceback.print_exc()
                reply = {"error": f"{type(error).__name__}: {error}"[:400]}
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
