"""What a child process of a benchmark is started for. It needs the standard library alone, so that a rival's own
environment can read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Task:
    """What a child is: `kind` of its script, in `variant`, for `jobs` of the work that lies in `folder`.

    `size` is what a round is: optimiser steps of every job, tokens of every stream, passes of a limit. What is
    `ours` runs in the environment that the service gives its device processes. `python` is the interpreter, "" for this
    environment's.
    """

    kind: str
    folder: str
    threads: int
    variant: str = ""
    jobs: tuple[int, ...] = ()
    size: int = 1
    ours: bool = False
    python: str = ""
