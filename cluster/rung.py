"""A part of a job's training: up to a rung, or on from one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """The job ends after the share `until` of its steps, on the schedule of all of them, and keeps its state for others
    to go on from; `after` is the job whose state it begins with, in place of its first step."""

    until: float = 1.0
    after: str | None = None
