"""Samplers by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from polygraft.tuning.objectives import Limit, Objective
from polygraft.tuning.samplers.evolution import Evolution
from polygraft.tuning.samplers.generations import Generations
from polygraft.tuning.samplers.population import Population
from polygraft.tuning.samplers.spread import Spread
from polygraft.tuning.samplers.staged import S4_STAGES, Staged
from polygraft.tuning.spaces.kinds import AnySpace
from polygraft.tuning.spaces.s4 import S4Space
from polygraft.tuning.study import Sampler

SamplerName = Literal["random", "lhs", "tpe", "gp", "saas", "nsga2", "evolution", "noah", "staged", "pbt"]


def sampler(  # noqa: PLR0913
    name: SamplerName,
    space: AnySpace,
    objectives: Sequence[Objective],
    *,
    limits: Sequence[Limit] = (),
    trials: int,
    startup: int,
    seed: int,
) -> Sampler:
    """The sampler of a search of so many `trials`, of which `startup` are spread evenly before a model proposes; the
    staged search has as many a stage as there are for each, and PBT a population of `startup` for as many rounds as
    that makes. Raises ValueError for a number of trials or a space that is none of the sampler's."""
    parameters = space.parameters
    match name:
        case "random":
            return Spread(parameters, 1, seed)
        case "lhs":
            return Spread(parameters, trials, seed)
        case "evolution":
            return Evolution(parameters, seed=seed, population=max(startup, 2))
        case "saas":
            from polygraft.tuning.samplers.saas import Saas, installed  # which imports what the next import does

            if not installed():
                raise ValueError("sampler: saas needs BoTorch, which is not installed: pip install 'polygraft[saas]'")
            if any(limit.name in {one.name for one in objectives} for limit in limits):
                raise ValueError("sampler: saas takes no measured limits; choose gp, or limit what is known of a graft")
            return Saas(parameters=parameters, objectives=tuple(objectives), startup=startup, seed=seed)
        case "noah":
            return Generations(parameters, max(startup, 2), seed)
        case "staged":
            if not isinstance(space, S4Space):
                raise ValueError("sampler: staged decides S4's design part by part; give the space s4")
            return Staged(parameters, per_stage=max(1, trials // len(S4_STAGES)), seed=seed)
        case "pbt":
            if startup < 2 or trials % startup or trials == startup:
                raise ValueError(
                    f"trials: {trials} are not rounds of pbt's population; give 2, 3, ... times startup ({startup}), "
                    "which is at least 2"
                )
            return Population(parameters, startup, seed)
        case "tpe" | "gp" | "nsga2":
            from polygraft.tuning.samplers.optuna import OptunaSampler  # whose imports take a third of a second

            return OptunaSampler(
                parameters=parameters,
                objectives=tuple(objectives),
                limits=tuple(limit for limit in limits if limit.name in {one.name for one in objectives}),
                model=name,
                startup=startup,
                seed=seed,
            )
