"""What is replayed: every sampler and pruner of tuning/, and Optuna's own as they come, all fixed before."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Literal

import numpy as np
import optuna

from peft_table.replay import View
from polygraft.tuning.objectives import LOSS, PARAMETERS, Objective
from polygraft.tuning.pruners.choose import PrunerName
from polygraft.tuning.pruners.choose import pruner as ours
from polygraft.tuning.pruners.curves import Curve, Pruner
from polygraft.tuning.pruners.early_exit import EarlyExit
from polygraft.tuning.pruners.halving import ETA, RUNGS, Halving
from polygraft.tuning.samplers.choose import SamplerName
from polygraft.tuning.samplers.choose import sampler as own
from polygraft.tuning.spaces.parameters import Choice, Config, LogUniform, Parameter, filled, projected
from polygraft.tuning.study import Sampler, Trial

STARTUP = 10  # trials before a model proposes: Optuna's number, for all
POPULATION = 16  # of both NSGA-II: Optuna's own of 50 would be random search at 40 trials

Theirs = Literal["random", "tpe", "gp", "nsga2"]


@dataclass(frozen=True, slots=True)
class Arm:
    """A sampler and a pruner by their names; `optuna` before one says that it is Optuna's with its defaults, a number
    after `early-exit` is its `times`, where they are not its own."""

    sampler: str
    pruner: str = "none"
    seeds: int = 100

    @property
    def name(self) -> str:
        return self.sampler if self.pruner == "none" else f"{self.sampler}, {self.pruner}"

    def sampler_for(self, view: View, objectives: Sequence[Objective], trials: int, seed: int) -> Sampler:
        match self.sampler.split():
            case ["optuna", ("random" | "tpe" | "gp" | "nsga2") as theirs]:
                return AsItComes(view.space.parameters, tuple(objectives), theirs, seed)
            case [name]:
                found: SamplerName = name  # type: ignore[assignment]  # one that it does not know, it refuses
                return own(found, view.space, objectives, trials=trials, startup=STARTUP, seed=seed)
            case _:
                raise ValueError(f"no sampler {self.sampler!r}")

    def pruner_for(self) -> Pruner | None:
        match self.pruner.split():
            case ["optuna", "asha"]:
                return OptunaAsha()
            case ["early-exit", times]:
                return EarlyExit(times=float(times))
            case _:
                name: PrunerName = self.pruner  # type: ignore[assignment]  # one that it does not know, it refuses
                return ours(name)


GP_SEEDS = 6  # a proposal of a Gaussian process takes seconds
CURVE_SEEDS = 40  # of what early exit would save and cost otherwise
_OWN = ("random", "lhs", "tpe", "nsga2", "evolution")
_OPTUNAS = ("optuna random", "optuna tpe", "optuna nsga2")
_GP = (Arm("gp", seeds=GP_SEEDS), Arm("optuna gp", seeds=GP_SEEDS))
_STOPS = (
    *(Arm("random", pruner) for pruner in ("none", "halving", "hyperband", "early-exit", "optuna asha")),
    *(Arm("random", f"early-exit {times}", seeds=CURVE_SEEDS) for times in (0.3, 1, 3, 6)),
    *(Arm("tpe", pruner, seeds=20) for pruner in ("none", "early-exit")),
)


@dataclass(frozen=True, slots=True)
class Setting:
    """Studies of so many trials on the rows of a space, once with every arm and seed."""

    name: str
    space: str
    objectives: tuple[Objective, ...]
    trials: int
    arms: tuple[Arm, ...]


SETTINGS = (
    Setting("autopeft", "autopeft", (LOSS, PARAMETERS), 40, (*map(Arm, (*_OWN, *_OPTUNAS)), *_GP)),
    # S4's grafts all have about as many parameters as they may: what they differ in is the loss.
    Setting("s4", "s4", (LOSS,), 40, tuple(map(Arm, (*_OWN, "staged", *_OPTUNAS)))),
    Setting("autopeft, stopping", "autopeft", (LOSS,), 64, _STOPS),
    Setting("autopeft, stopping, by fronts", "autopeft", (LOSS, PARAMETERS), 64, _STOPS[:5]),
    Setting("s4, stopping", "s4", (LOSS,), 64, _STOPS),
)


@dataclass(frozen=True, slots=True)
class AsItComes:
    """Optuna's sampler with its own defaults (NSGA-II's population apart), given the same trials as ours."""

    parameters: tuple[Parameter, ...]
    objectives: tuple[Objective, ...]
    model: Theirs
    seed: int

    def propose(self, trials: Sequence[Trial], attempt: int) -> Config:
        distributions = {parameter.name: _distribution(parameter) for parameter in self.parameters}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(
                directions=["minimize"] * len(self.objectives), sampler=self._sampler(len(trials), attempt)
            )
            study.add_trials([self._known(trial, distributions) for trial in trials])
            return projected(self.parameters, study.ask(distributions).params)

    def _sampler(self, number: int, attempt: int) -> optuna.samplers.BaseSampler:
        seed = int(np.random.SeedSequence([self.seed, number, attempt]).generate_state(1)[0])
        match self.model:
            case "random":
                return optuna.samplers.RandomSampler(seed=seed)
            case "tpe":
                return optuna.samplers.TPESampler(seed=seed)
            case "gp":
                return optuna.samplers.GPSampler(seed=seed)
            case "nsga2":
                return optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION)

    def _known(
        self, trial: Trial, distributions: Mapping[str, optuna.distributions.BaseDistribution]
    ) -> optuna.trial.FrozenTrial:
        state = optuna.trial.TrialState.RUNNING if trial.outcome is None else optuna.trial.TrialState.FAIL
        values = trial.values and [log(v) if o.log else v for o, v in zip(self.objectives, trial.values, strict=True)]
        return optuna.trial.create_trial(
            state=optuna.trial.TrialState.COMPLETE if values else state,
            params=dict(filled(self.parameters, trial.config)),
            distributions=dict(distributions),
            values=values,
            system_attrs={"NSGAIISampler:generation": trial.number // POPULATION} if self.model == "nsga2" else None,
        )


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    match parameter:
        case LogUniform(low=low, high=high):
            return optuna.distributions.FloatDistribution(low, high, log=True)
        case Choice(count=count):
            return optuna.distributions.CategoricalDistribution(range(count))
        case _:
            return optuna.distributions.IntDistribution(int(parameter.low), int(parameter.high))


@dataclass
class OptunaAsha:
    """Optuna's SuccessiveHalvingPruner at the rungs of ours, told what ours is told."""

    study: optuna.Study | None = None
    trials: dict[int, optuna.Trial] = field(default_factory=dict)

    def looks(self, trial: int, steps_total: int) -> tuple[int, ...]:
        if self.study is None:
            rule = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=ETA)
            self.study = optuna.create_study(pruner=rule)
        return Halving().looks(trial, steps_total)

    def reason_to_stop(self, curves: Mapping[int, Curve], trial: int) -> str | None:
        assert self.study is not None
        rung = len(curves[trial].losses) - 1
        if rung >= RUNGS:
            return None
        if trial not in self.trials:
            self.trials[trial] = self.study.ask()
        one = self.trials[trial]
        one.report(curves[trial].losses[-1], step=ETA**rung)
        return "not promoted" if one.should_prune() else None
