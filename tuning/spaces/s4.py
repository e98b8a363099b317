"""S4's design space (Chen et al. 2023, arXiv 2301.01821): how layers are grouped, what each group may spend, which
groups are tuned, and with which methods.

Every graft of it is within the budget by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from polygraft.grafts.s4 import FOUND, GROUPINGS, SPENDINGS, s4
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError
from polygraft.tuning.space import LEARNING_RATE, Candidate, Rates, candidate, rates
from polygraft.tuning.spaces.parameters import Choice, Config, InvalidConfig, Parameter, Whole, check

SHARE = 0.005  # of the backbone's parameters, as in the paper
STRATEGIES = tuple("".join(some) for size in range(1, 5) for some in combinations("APBL", size))
_GROUPS = (1, 2, 3, 4)
_METHODS = ("serial", "lora", "prefix", "bitfit")


@dataclass(frozen=True, slots=True)
class S4Space:
    """Grafts of at most `most` trainable parameters."""

    shape: ModelShape
    most: int
    learning_rate: Rates
    kind: Literal["s4"] = "s4"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Choice("grouping", len(GROUPINGS)),
            Choice("spending", len(SPENDINGS)),
            *(Whole(f"tuned_{group}", 0, 1) for group in _GROUPS),
            *(Choice(f"methods_{group}", len(STRATEGIES), (f"tuned_{group}", (1,))) for group in _GROUPS),
            self.learning_rate.parameter,
        )

    def candidate(self, config: Config) -> Candidate:
        """The graft at a point. Raises InvalidConfig for no group at all, or too little for one of each method."""
        check(self.parameters, config)
        strategies = [STRATEGIES[int(config[f"methods_{g}"])] if config[f"tuned_{g}"] else "" for g in _GROUPS]
        if not any(strategies):
            raise InvalidConfig("no group is tuned")
        try:
            peft = s4(
                self.shape,
                self.most,
                strategies,
                grouping=tuple(GROUPINGS)[int(config["grouping"])],
                spending=tuple(SPENDINGS)[int(config["spending"])],
            )
        except SpecError as error:
            raise InvalidConfig(str(error)) from None
        return candidate(peft, config[LEARNING_RATE], self.learning_rate, self.shape, self.most)

    def config(self, *, grouping: str, spending: str, strategies: Sequence[str], learning_rate: float) -> Config:
        """The point of these names, each strategy one of STRATEGIES or "" for a group that is not tuned."""
        found: dict[str, int | float] = {
            "grouping": tuple(GROUPINGS).index(grouping),
            "spending": tuple(SPENDINGS).index(spending),
        }
        found |= {f"tuned_{g}": int(bool(group)) for g, group in zip(_GROUPS, strategies, strict=True)}
        for g, group in zip(_GROUPS, strategies, strict=True):
            if group:
                found[f"methods_{g}"] = STRATEGIES.index(group)
        return found | {LEARNING_RATE: learning_rate}


def s4_space(shape: ModelShape, *, most: int, learning_rate: Rates | None = None) -> S4Space:
    """Raises SpecError for a budget below the smallest graft: one group, with one method."""
    space = S4Space(shape, most, learning_rate or rates(_METHODS))
    alone = (tuple("A" if g == group else "" for g in _GROUPS) for group in _GROUPS)
    for strategies in (FOUND, *alone):
        try:
            s4(shape, most, strategies)
        except SpecError as error:
            reason = error
        else:
            return space
    raise SpecError(f"most: no graft of S4's space has at most {most} trainable parameters: {reason}")
