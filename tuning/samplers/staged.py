"""S4's staged greedy search (Chen et al. 2023, arXiv 2301.01821, section 3.2): one part of the design after the other.

A stage tries many random models of the space, with what earlier stages chose held fast, and chooses the pattern of its
part whose models have the lowest mean. As published: 100 models a stage, trained little; grouping of layers, spending,
which groups are tuned, then the methods of one group after the other. It departs in the measure, which is the first
objective and not the mean score over GLUE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from polygraft.tuning.samplers.spread import Spread
from polygraft.tuning.spaces.parameters import Config, Parameter, filled, projected
from polygraft.tuning.study import NotYet, Trial

PER_STAGE = 100
Pattern = tuple[int | float | None, ...]

S4_STAGES = (
    ("grouping",),
    ("spending",),
    ("tuned_1", "tuned_2", "tuned_3", "tuned_4"),
    ("methods_1",),
    ("methods_2",),
    ("methods_3",),
    ("methods_4",),
)


@dataclass(frozen=True, slots=True)
class Staged:
    """`stages` are the names of the parameters that each chooses; after the last all of them are held fast."""

    parameters: tuple[Parameter, ...]
    stages: tuple[tuple[str, ...], ...] = S4_STAGES
    per_stage: int = PER_STAGE
    seed: int = 0

    def propose(self, trials: Sequence[Trial], attempt: int) -> Config:
        """Raises NotYet until the stages before are over."""
        over = len(trials) - len(trials) % self.per_stage
        if any(trial.outcome is None for trial in trials[: min(over, self.per_stage * len(self.stages))]):
            raise NotYet("the stage before is not over")
        drawn = Spread(self.parameters, 1, self.seed).propose(trials, attempt)
        values = dict(filled(self.parameters, drawn))
        # A part that the draw does not have may be there once the parts before it are held fast.
        again = Spread(_unconditional(self.parameters), 1, self.seed).propose(trials, attempt)
        values |= {name: value for name, value in again.items() if name not in drawn}
        for stage in range(min(len(trials) // self.per_stage, len(self.stages))):
            values |= self.chosen(trials, stage)
        return projected(self.parameters, values)

    def chosen(self, trials: Sequence[Trial], stage: int) -> Config:
        """What a stage chose, by the results of its own trials that are told; nothing without any."""
        means = self.means(trials, stage)
        if not means:
            return {}
        best = min(means, key=lambda pattern: (means[pattern], [-1 if v is None else v for v in pattern]))
        return {name: value for name, value in zip(self.stages[stage], best, strict=True) if value is not None}

    def means(self, trials: Sequence[Trial], stage: int) -> dict[Pattern, float]:
        """The mean of the first objective of every pattern that was tried in the stage."""
        found: dict[Pattern, list[float]] = {}
        for trial in trials[stage * self.per_stage : (stage + 1) * self.per_stage]:
            if trial.values is not None:
                pattern = tuple(trial.config.get(name) for name in self.stages[stage])
                found.setdefault(pattern, []).append(trial.values[0])
        return {pattern: fmean(losses) for pattern, losses in found.items()}


def _unconditional(parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
    return tuple(replace(parameter, when=None) for parameter in parameters)
