"""The cells of the search benchmark, fixed before it runs: their arms and what is claimed of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from harness import Arm
from measure import Goal, Op
from search_work import steps_of

TOKENS: Mapping[str, int] = {"long": 20_000, "short": 1_000, "halving": 20_000}
_TYPES = ("bfloat16", "float32")
_AT_ONCE = tuple(f"{dtype} {at_once}" for dtype in _TYPES for at_once in (1, 2))
ARMS = (
    Arm("ours", "our service, POST /v1/searches to its end, one pack", ("auto",)),
    Arm("tune", "Ray Tune, PEFT in a process a trial", _AT_ONCE),
    Arm("tune_reuse", "Ray Tune, reuse_actors: process and model are kept", _AT_ONCE),
    Arm("optuna", "Optuna and PEFT in one process, adapters one after the other", tuple(f"{t} 1" for t in _TYPES)),
    Arm("ceiling", "the backbone's products alone, at twelve trials' rows", ("auto",), limit=True),
)
# What stands in the samples beside an arm's speed, by the end of its name.
BESIDE = {"start": "seconds until it could be asked", "volume": "hypervolume of its front, nats x decades"}


@dataclass(frozen=True, slots=True)
class Cell:
    name: str
    tokens: int
    batch: int

    @property
    def steps(self) -> int:
        return steps_of(self.tokens, self.batch)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Optuna's own successive halving takes one objective alone and is no part of the question."""
        return tuple(arm for arm in ARMS if self.name != "halving" or arm.name != "optuna")

    @property
    def goals(self) -> tuple[Goal, ...]:
        """A makespan of at most 0.55 is a speed of at least 1 / 0.55. With a batch of 8 all are only reported."""
        most = {"long": {"tune": 0.55, "optuna": 0.40}, "short": {"tune": 0.35}, "halving": {"tune": 0.45}}[self.name]
        rivals = [arm.name for arm in self.arms if arm.name not in ("ours", "ceiling")]
        found = [self._goal(rival, "speed", 1 / most[rival] if rival in most else None) for rival in rivals]
        found += [self._goal(rival, "volume", 0.98 if self.name != "halving" else None) for rival in rivals]
        return (*found, Goal(f"search.{self.name}.share_of_ceiling", "speed", "ours", ("ceiling",)))

    def _goal(self, rival: str, what: str, least: float | None) -> Goal:
        suffix = "" if what == "speed" else f" {what}"
        judged = least is not None and self.batch == 1
        id = f"search.{self.name}.{what}_{rival}"
        op: Op | None = ">=" if judged else None
        return Goal(id, "speed", f"ours{suffix}", (f"{rival}{suffix}",), op, least if judged else None)
