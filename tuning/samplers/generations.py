"""NOAH's evolution over the subnets of a supernet (Zhang et al. 2024, arXiv 2206.04673, section 3.3, and its code).

A generation at random; then generation by generation half by mutation, each parameter of a parent being drawn anew with
probability 0.2, and half by crossover, each parameter being one of two parents'. Parents are the best of all so far: 10
for generations of 50, as published, which ran 15 of them. A generation waits for the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polygraft.tuning.samplers.spread import Spread
from polygraft.tuning.spaces.parameters import Config, Parameter, filled, projected
from polygraft.tuning.study import MODEL_ATTEMPTS, NotYet, Trial

POPULATION = 50
PARENTS = 0.2  # of a generation's size
MUTATION = 0.2  # the probability of each parameter to be drawn anew


@dataclass(frozen=True, slots=True)
class Generations:
    """Minimises the first objective."""

    parameters: tuple[Parameter, ...]
    population: int = POPULATION
    seed: int = 0

    def propose(self, trials: Sequence[Trial], attempt: int) -> Config:
        """Raises NotYet until the generations before are over."""
        first = len(trials) - len(trials) % self.population
        if any(trial.outcome is None for trial in trials[:first]):
            raise NotYet("the generation before is not over")
        done = [(trial.values[0], trial.number, trial.config) for trial in trials[:first] if trial.values is not None]
        if not done or attempt >= MODEL_ATTEMPTS:
            return Spread(self.parameters, 1, self.seed).propose(trials, attempt)
        best = [config for _, _, config in sorted(done, key=lambda one: one[:2])[: self._parents]]
        chance = np.random.default_rng([self.seed, len(trials), attempt])
        one, other = (filled(self.parameters, best[int(chance.integers(len(best)))]) for _ in range(2))
        values: dict[str, int | float] = {}
        for parameter in self.parameters:
            drawn, share = parameter.at(float(chance.random())), float(chance.random())
            if len(trials) - first < self.population // 2:
                values[parameter.name] = drawn if share < MUTATION else one[parameter.name]
            else:
                values[parameter.name] = (one if share < 0.5 else other)[parameter.name]
        return projected(self.parameters, values)

    @property
    def _parents(self) -> int:
        return max(1, round(PARENTS * self.population))
