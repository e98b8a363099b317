"""Configurations without a model: by chance, or a Latin hypercube (McKay, Beckman & Conover 1979)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polygraft.tuning.spaces.parameters import Config, Parameter, at_shares
from polygraft.tuning.study import Trial


@dataclass(frozen=True, slots=True)
class Spread:
    """A Latin hypercube of `block` points after the other: of every `block` trials each has its own slice of every
    parameter's range. With a block of 1 it is random search."""

    parameters: tuple[Parameter, ...]
    block: int = 1
    seed: int = 0

    def propose(self, trials: Sequence[Trial], attempt: int) -> Config:
        """Of trial number len(trials); every block and every attempt has a hypercube of its own."""
        block, index = divmod(len(trials), self.block)
        chance = np.random.default_rng([self.seed, attempt, block])
        strata = chance.permuted(np.tile(np.arange(self.block), (len(self.parameters), 1)), axis=1)[:, index]
        shares = (strata + chance.random(len(self.parameters))) / self.block
        return at_shares(self.parameters, map(float, shares))
