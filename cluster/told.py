"""What a study's record says, for those who answer about it and cannot read it: only `tuning` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

JsonObject = dict[str, JsonValue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """`trials` in their order and the numbers of those on the `front`; `finals` what those came to that were trained
    again, and the `chosen` one; `parameters` the axes of the space; `job` what every trial trains, on a backbone of
    this `shape`. Until the search is over it `needs` these files and versions of grafts."""

    objectives: tuple[str, ...] = ()
    trials_total: int = 0
    trials: tuple[JsonObject, ...] = ()
    front: tuple[int, ...] = ()
    finals: tuple[JsonObject, ...] = ()
    chosen: int | None = None
    parameters: tuple[JsonObject, ...] = ()
    job: JsonObject = field(default_factory=dict)
    shape: JsonObject = field(default_factory=dict)
    needs: frozenset[str] = frozenset()

    @property
    def states(self) -> Mapping[str, int]:
        """How many trials are in each state."""
        states = [str(trial["state"]) for trial in self.trials]
        return {state: states.count(state) for state in sorted(set(states))}
