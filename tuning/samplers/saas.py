"""AutoPEFT's surrogate and acquisition (Zhou et al. 2024, arXiv 2301.12132, section 3.2), by BoTorch.

A Gaussian process with a sparse axis-aligned prior for each objective (SAAS: Eriksson & Jankowiak 2021, arXiv
2103.00349), after a Gaussian copula transform of what was measured; then the noisy expected hypervolume improvement
given the trials that are running, in logarithms (qNEHVI: Daulton et al. 2021, arXiv 2105.08195; Ament et al. 2023,
arXiv 2310.20708), or the expected improvement where there is one objective, maximised by local search from the front
and from chance over neighbours of configurations, as the paper's code does. It departs in that the prior's sparsity is
an ensemble of maximum a posteriori fits, where the paper samples it by NUTS (minutes a proposal, and JAX), and in the
reference point, which is the worst of the trials, where the paper has one by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import log
from typing import TYPE_CHECKING

import numpy as np

from polygraft.tuning.objectives import Objective
from polygraft.tuning.samplers.optuna import RESULTS, one_thread, quiet
from polygraft.tuning.samplers.spread import Spread
from polygraft.tuning.spaces.parameters import (
    Choice,
    Config,
    LogUniform,
    Parameter,
    Whole,
    at_shares,
    filled,
    projected,
)
from polygraft.tuning.study import MODEL_ATTEMPTS, Trial

if TYPE_CHECKING:
    from torch import Tensor

STARTS = 10  # of local search
STEPS = 20  # of each
DRAWN = 256  # configurations by chance, of which the best are starts
SAMPLES = 32  # of the posterior; a proposal with two objectives takes tens of seconds
Score = Callable[["Tensor"], "Tensor"]


def installed() -> bool:
    """Whether BoTorch, the extra `saas`, is there."""
    return find_spec("botorch") is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Saas:
    """Proposes by the model from trial number `startup` on. Torch's own random numbers stay as they were."""

    parameters: tuple[Parameter, ...]
    objectives: tuple[Objective, ...]
    startup: int = 4
    seed: int = 0

    def propose(self, trials: Sequence[Trial], attempt: int) -> Config:
        results = sum(trial.values is not None for trial in trials)
        if len(trials) < self.startup or results < RESULTS or attempt >= MODEL_ATTEMPTS:
            return Spread(self.parameters, self.startup, self.seed).propose(trials, attempt)
        import torch

        seed = int(np.random.SeedSequence([self.seed, len(trials), attempt]).generate_state(1)[0])
        chance = np.random.default_rng(seed)
        with quiet(), one_thread(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._best(self._acquisition(trials, seed), trials, chance)

    def _acquisition(self, trials: Sequence[Trial], seed: int) -> Score:
        """The acquisition of points [n, d] of the unit cube, [n]."""
        import torch
        from botorch.acquisition.logei import qLogNoisyExpectedImprovement
        from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import ModelListGP
        from botorch.models.map_saas import EnsembleMapSaasSingleTaskGP
        from botorch.sampling.normal import SobolQMCNormalSampler
        from gpytorch.mlls import ExactMarginalLogLikelihood

        done = [trial for trial in trials if trial.values is not None]
        x = torch.tensor([self.point(trial.config) for trial in done], dtype=torch.float64)
        running = [self.point(trial.config) for trial in trials if trial.outcome is None]
        pending = torch.tensor(running, dtype=torch.float64) if running else None
        y = -torch.stack([copula(self._column(done, index)) for index in range(len(self.objectives))], dim=-1)
        models = []
        for index in range(len(self.objectives)):
            model = EnsembleMapSaasSingleTaskGP(x, y[:, index : index + 1], outcome_transform=None)
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            models.append(model)
        given = {"X_baseline": x, "X_pending": pending, "prune_baseline": True}
        sampler = SobolQMCNormalSampler(torch.Size([SAMPLES]), seed=seed)
        if len(models) == 1:
            found = qLogNoisyExpectedImprovement(models[0], sampler=sampler, **given)
        else:
            worst = (y.min(0).values - 0.1).tolist()
            found = qLogNoisyExpectedHypervolumeImprovement(
                ModelListGP(*models), ref_point=worst, sampler=sampler, **given
            )

        def score(points: Tensor) -> Tensor:
            with torch.no_grad():
                values: Tensor = found(points.unsqueeze(1))
            return values

        return score

    def _best(self, score: Score, trials: Sequence[Trial], chance: np.random.Generator) -> Config:
        """The best configuration that local search finds, from perturbed good ones and from chance."""
        tried = {tuple(self.point(trial.config)) for trial in trials}
        done = sorted((t for t in trials if t.values is not None), key=lambda t: (t.values or (), t.number))
        starts = [self._neighbour(filled(self.parameters, one.config), chance) for one in done[:STARTS]]
        starts += [self._drawn(chance) for _ in range(DRAWN)]
        order = self._values(score, starts).argsort()[::-1]
        best = [starts[int(place)] for place in order[:STARTS]]
        values = self._values(score, best)
        for _ in range(STEPS):
            near = [self._neighbour(config, chance) for config in best for _ in range(4)]
            found = self._values(score, near).reshape(len(best), -1)
            for place, row in enumerate(found):
                if row.max() > values[place]:
                    best[place], values[place] = near[4 * place + int(row.argmax())], row.max()
        ranked = [best[int(place)] for place in values.argsort()[::-1]]
        fresh = [config for config in ranked if tuple(self.point(config)) not in tried]
        return projected(self.parameters, (fresh or ranked)[0])

    def _values(self, score: Score, configs: Sequence[Config]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        import torch

        points = torch.tensor([self.point(config) for config in configs], dtype=torch.float64)
        return np.asarray(score(points).numpy(), dtype=np.float64)

    def _drawn(self, chance: np.random.Generator) -> Config:
        shares = map(float, chance.random(len(self.parameters)))
        return filled(self.parameters, at_shares(self.parameters, shares))

    def _neighbour(self, config: Config, chance: np.random.Generator) -> Config:
        """With one parameter at a near value, or another one where none is near."""
        moved = self.parameters[int(chance.integers(len(self.parameters)))]
        share = float(chance.random())
        if isinstance(moved, Whole):
            step = 1 if share < 0.5 else -1
            value: float = min(moved.high, max(moved.low, int(config[moved.name]) + step))
        elif isinstance(moved, Choice):
            value = moved.at(share)
        else:
            value = moved.at(min(1.0, max(0.0, share_of(moved, config[moved.name]) + 0.2 * (share - 0.5))))
        return {**config, moved.name: value}

    def point(self, config: Config) -> list[float]:
        """A configuration in the unit cube; a choice has an axis for each of its things."""
        values = filled(self.parameters, config)
        return [axis for parameter in self.parameters for axis in _axes(parameter, values[parameter.name])]

    def _column(self, done: Sequence[Trial], index: int) -> list[float]:
        found = [trial.values[index] for trial in done if trial.values is not None]
        return [log(value) for value in found] if self.objectives[index].log else found


def share_of(parameter: Parameter, value: float) -> float:
    """Inverse of `at`, but for whole numbers, which are spread from end to end."""
    if parameter.low == parameter.high:
        return 0.5
    if isinstance(parameter, LogUniform):
        return (log(value) - log(parameter.low)) / (log(parameter.high) - log(parameter.low))
    return (value - parameter.low) / (parameter.high - parameter.low)


def copula(values: Sequence[float]) -> Tensor:
    """Each value as the normal quantile of its rank, equal ones alike: the empirical Gaussian copula."""
    import torch
    from scipy.stats import norm, rankdata  # type: ignore[import-untyped]

    ranks = (rankdata(values) - 0.5) / len(values)
    return torch.tensor(norm.ppf(ranks), dtype=torch.float64)


def _axes(parameter: Parameter, value: float) -> Iterator[float]:
    if isinstance(parameter, Choice):
        yield from (float(index == value) for index in range(parameter.count))
    else:
        yield share_of(parameter, value)
