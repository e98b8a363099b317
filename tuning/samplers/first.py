"""Configurations that are given, before those of a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polygraft.tuning.spaces.parameters import Config
from polygraft.tuning.study import Sampler, Trial


@dataclass(frozen=True, slots=True)
class First:
    """One that means no graft or was tried leaves its place to the sampler."""

    configs: tuple[Config, ...]
    sampler: Sampler

    def propose(self, trials: Sequence[Trial], attempt: int) -> Config:
        if len(trials) < len(self.configs) and not attempt:
            return self.configs[len(trials)]
        return self.sampler.propose(trials, attempt)
