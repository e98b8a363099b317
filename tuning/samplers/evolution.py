"""Regularised evolution (Real et al. 2019, arXiv 1802.01548, algorithm 1): the youngest live on, not the best.

As published: a random population of P; then each child is its parent with one mutation, the parent being the best of S
drawn from the P youngest. It departs in what is one mutation: a parameter that is there gets another value of its
range, an ordered one a neighbour's as often as any; and in several running at once, a trial counting as soon as it is
told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polygraft.tuning.samplers.spread import Spread
from polygraft.tuning.spaces.parameters import Config, Parameter, Whole, filled, is_there, projected
from polygraft.tuning.study import MODEL_ATTEMPTS, Trial

POPULATION = 20  # P; the paper has 100 of 20,000 trials
SAMPLE = 5  # S; the paper has 25 of its 100


@dataclass(frozen=True, slots=True)
class Evolution:
    """Minimises the first objective."""

    parameters: tuple[Parameter, ...]
    population: int = POPULATION
    sample: int = SAMPLE
    seed: int = 0

    def propose(self, trials: Sequence[Trial], attempt: int) -> Config:
        done = [(trial, trial.values[0]) for trial in trials if trial.values is not None]
        if len(trials) < self.population or not done or attempt >= MODEL_ATTEMPTS:
            return Spread(self.parameters, self.population, self.seed).propose(trials, attempt)
        chance = np.random.default_rng([self.seed, len(trials), attempt])
        youngest = done[-self.population :]
        drawn = chance.choice(len(youngest), size=min(self.sample, len(youngest)), replace=False)
        parent = min((youngest[int(i)] for i in drawn), key=lambda pair: (pair[1], pair[0].number))[0]
        return mutated(self.parameters, parent.config, chance)


def mutated(parameters: Sequence[Parameter], config: Config, chance: np.random.Generator) -> Config:
    """The configuration with another value of one parameter that is there and has one; what comes to be there by it is
    drawn, too."""
    there = [p for p in parameters if is_there(p, config) and p.low < p.high]
    chosen = there[int(chance.integers(len(there)))]
    drawn = {p.name: p.at(float(chance.random())) for p in parameters}
    values = dict(filled(parameters, config)) | {p.name: drawn[p.name] for p in parameters if p.name not in config}
    values[chosen.name] = _another(chosen, config[chosen.name], chance)
    return projected(parameters, values)


def _another(parameter: Parameter, value: int | float, chance: np.random.Generator) -> int | float:
    if isinstance(parameter, Whole) and chance.random() < 0.5:
        steps = [near for near in (int(value) - 1, int(value) + 1) if parameter.low <= near <= parameter.high]
        return steps[int(chance.integers(len(steps)))]
    other = parameter.at(float(chance.random()))
    while other == value:
        other = parameter.at(float(chance.random()))
    return other
