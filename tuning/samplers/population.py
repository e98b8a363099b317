"""Population based training (Jaderberg et al. 2017, arXiv 1711.09846): a population trains together, and what does
badly goes on as a copy of what does well.

A trial is a member of the population for one round, up to the round's rung of its steps. Exploit is truncation
selection, as published: a member of the worst fifth goes on from the state (weights, moments, place in the data) of one
of the best fifth, drawn at random. Explore multiplies its learning rate by 1.2 or 0.8; the graft is what the state is
of, so nothing else may change. The others go on from their own state. It departs in that members wait for one another
at each rung, so that a search is the same whoever is faster and whatever is killed on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polygraft.tuning.samplers.spread import Spread
from polygraft.tuning.space import LEARNING_RATE
from polygraft.tuning.spaces.parameters import Config, Parameter
from polygraft.tuning.study import NotYet, Trial

SHARE = 0.2  # of the population that copies, and that is copied
FACTORS = (0.8, 1.2)


@dataclass(frozen=True, slots=True)
class Population:
    """Minimises the first objective. Trial n is member n mod `size` in round n div `size`."""

    parameters: tuple[Parameter, ...]
    size: int
    seed: int = 0

    def propose(self, trials: Sequence[Trial], attempt: int) -> Config:
        parent = self.parent(trials)
        if parent is None:
            return Spread(self.parameters, self.size, self.seed).propose(trials, attempt)
        config = trials[parent].config
        if parent == len(trials) - self.size and not attempt:
            return config
        chance = np.random.default_rng([self.seed, len(trials), attempt])
        rate = next(one for one in self.parameters if one.name == LEARNING_RATE)
        explored = config[LEARNING_RATE] * FACTORS[int(chance.integers(len(FACTORS)))]
        return {**config, LEARNING_RATE: min(rate.high, max(rate.low, explored))}

    def parent(self, trials: Sequence[Trial]) -> int | None:
        """The trial that the next one goes on from: its own predecessor or a better one; None for one that begins.
        Raises NotYet until all of the round before are told."""
        own = len(trials) - self.size
        if own < 0:
            return None
        first = own - own % self.size
        before = trials[first : first + self.size]
        if any(trial.outcome is None for trial in before):
            raise NotYet("the round before is not over")
        ranked = sorted(before, key=lambda trial: (trial.values or (float("inf"),), trial.number))
        copied = max(1, round(SHARE * self.size))
        best = [trial.number for trial in ranked[:copied] if trial.values is not None]
        if not best:
            return None
        if trials[own].values is not None and own not in {trial.number for trial in ranked[-copied:]}:
            return own
        chance = np.random.default_rng([self.seed, len(trials)])
        return best[int(chance.integers(len(best)))]
