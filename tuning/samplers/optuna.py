"""Optuna's samplers as functions of the trials: Optuna's study is made of them, and kept as long as they go on.

The first trials are a Latin hypercube, which covers every parameter's range evenly. Then a model proposes, given the
results and the trials still running, so that several at once do not flock together: TPE (Watanabe 2023, arXiv
2304.11127), the one for conditional spaces, at no cost to speak of; Optuna's Gaussian process with qLogEHVI (Ament et
al. 2023, arXiv 2310.20708), which imports torch and takes seconds a proposal; or NSGA-II (Deb et al. 2002). On an
invented AutoPEFT-like problem of ten parameters TPE found the larger hypervolume in 12 trials, the Gaussian process
in 30.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import log
from typing import Literal

import numpy as np
import optuna

from polygraft.tuning.objectives import Limit, Objective
from polygraft.tuning.samplers.spread import Spread
from polygraft.tuning.samplers.told import Told
from polygraft.tuning.spaces.parameters import (
    Choice,
    Config,
    LogUniform,
    Parameter,
    Uniform,
    filled,
    is_there,
    projected,
)
from polygraft.tuning.study import MODEL_ATTEMPTS, NotYet, Stopped, Trial

Model = Literal["tpe", "gp", "nsga2"]
RESULTS = 2  # fewer than these say nothing about what to change
POPULATION = 16  # of a generation of NSGA-II
_GENERATION = "NSGAIISampler:generation"  # where Optuna's sampler keeps it


@dataclass(frozen=True, slots=True, kw_only=True)
class OptunaSampler:
    """Proposes with `model` from trial number `startup` on, as soon as there are RESULTS results. Limits on measured
    objectives are its constraints."""

    parameters: tuple[Parameter, ...]
    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...] = ()
    model: Model = "tpe"
    startup: int = 4
    seed: int = 0
    _told: list[Told] = field(default_factory=list, init=False, repr=False, compare=False)  # the last proposal's

    def propose(self, trials: Sequence[Trial], attempt: int) -> Config:
        trials = self._generations(trials) if self.model == "nsga2" else trials
        results = sum(trial.values is not None for trial in trials)
        # A model may insist on a point that was tried; the last attempts leave the choice to chance.
        if len(trials) < self.startup or results < RESULTS or attempt >= MODEL_ATTEMPTS:
            return Spread(self.parameters, self.startup, self.seed).propose(trials, attempt)
        with quiet(), one_thread() if self.model == "gp" else nullcontext():
            told = self._told.pop() if self._told else None
            if told is None or not told.leads_to(trials):
                told = Told(len(self.objectives))
            told.tell(trials, self._known)
            distributions = None if self._defined_by_run else self._distributions(self.parameters)
            with told.asked(self._sampler(len(trials), attempt), distributions) as asked:
                if self._defined_by_run:
                    _suggest(asked, self.parameters)
                config = projected(self.parameters, asked.params)
            self._told.append(told)  # not when anything above was broken off
            return config

    def _generations(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        """The trials as NSGA-II sees them, whoever is faster: all of the generations before, of its own nothing. Raises
        NotYet until those are told."""
        first = len(trials) - len(trials) % POPULATION
        if any(trial.outcome is None for trial in trials[:first]):
            raise NotYet("the generation before is not over")
        return [*trials[:first], *(replace(trial, outcome=None) for trial in trials[first:])]

    @property
    def _defined_by_run(self) -> bool:
        """Whether the model sees of a trial only the parameters that are there; the others want all of them."""
        return self.model == "tpe" and any(parameter.when for parameter in self.parameters)

    def _sampler(self, number: int, attempt: int) -> optuna.samplers.BaseSampler:
        seed = int(np.random.SeedSequence([self.seed, number, attempt]).generate_state(1)[0])
        match self.model:
            case "tpe":
                return optuna.samplers.TPESampler(
                    seed=seed,
                    n_startup_trials=RESULTS,
                    multivariate=True,
                    group=self._defined_by_run,
                    constant_liar=True,
                )
            case "gp":
                return optuna.samplers.GPSampler(seed=seed, n_startup_trials=RESULTS)
            case "nsga2":
                return optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION)

    def _known(self, trial: Trial) -> optuna.trial.FrozenTrial:
        states = {
            "running": optuna.trial.TrialState.RUNNING,
            "complete": optuna.trial.TrialState.COMPLETE,
            # TPE ranks trials that were stopped by how far they came, where there is one objective.
            "stopped": optuna.trial.TrialState.PRUNED if len(self.objectives) == 1 else optuna.trial.TrialState.FAIL,
        }
        values = trial.values and [log(v) if o.log else v for o, v in zip(self.objectives, trial.values, strict=True)]
        params = trial.config if self._defined_by_run else filled(self.parameters, trial.config)
        stopped = trial.outcome if isinstance(trial.outcome, Stopped) else None
        return optuna.trial.create_trial(
            state=states.get(trial.state, optuna.trial.TrialState.FAIL),
            params=dict(params),
            distributions=self._distributions([p for p in self.parameters if p.name in params]),
            values=values,
            intermediate_values={stopped.step: stopped.loss} if stopped else None,
            constraints=self._constraints(trial),
            system_attrs={_GENERATION: trial.number // POPULATION} if self.model == "nsga2" else None,
        )

    def _constraints(self, trial: Trial) -> dict[str, float] | None:
        """How far above its limit each limited objective is; of every trial with values, or of none."""
        if trial.values is None:
            return None
        values = {objective.name: value for objective, value in zip(self.objectives, trial.values, strict=True)}
        return {limit.name: values[limit.name] - limit.most for limit in self.limits if limit.name in values} or None

    def _distributions(self, parameters: Sequence[Parameter]) -> dict[str, optuna.distributions.BaseDistribution]:
        return {parameter.name: distribution(parameter) for parameter in parameters}


def _suggest(trial: optuna.Trial, parameters: Sequence[Parameter]) -> None:
    """One parameter after the other, those that are there given the ones before."""
    config: dict[str, int | float] = {}
    for parameter in parameters:
        if is_there(parameter, config):
            match parameter:
                case LogUniform(name=name, low=low, high=high):
                    config[name] = trial.suggest_float(name, low, high, log=True)
                case Uniform(name=name, low=low, high=high):
                    config[name] = trial.suggest_float(name, low, high)
                case Choice(name=name, count=count):
                    config[name] = trial.suggest_categorical(name, range(count))
                case _:
                    config[parameter.name] = trial.suggest_int(parameter.name, parameter.low, parameter.high)


def distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    match parameter:
        case LogUniform(low=low, high=high):
            return optuna.distributions.FloatDistribution(low, high, log=True)
        case Uniform(low=low, high=high):
            return optuna.distributions.FloatDistribution(low, high)
        case Choice(count=count):
            return optuna.distributions.CategoricalDistribution(range(count))
        case _:
            return optuna.distributions.IntDistribution(parameter.low, parameter.high)


@contextmanager
def one_thread() -> Iterator[None]:
    """Optuna does this itself around every small step, and then changing it back and forth takes most of the time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's report of every study it makes, and the libraries' advice on how to call them."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
