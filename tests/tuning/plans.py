"""Plans and invented results for the tests of the search."""

from __future__ import annotations

from math import exp, log1p, log10

from polygraft.cluster.spec import read_request
from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.samplers.choose import SamplerName
from polygraft.tuning.space import Space
from polygraft.tuning.spaces.autopeft import autopeft
from polygraft.tuning.spaces.kinds import AnySpace
from polygraft.tuning.spaces.parameters import Config
from polygraft.tuning.study import Result, Trial
from tests.tuning.standin import SHAPE


def plan_of(
    trials: int = 12, *, space: AnySpace | None = None, model: SamplerName = "tpe", seed: int = 0, lease_s: float = 60.0
) -> SearchPlan:
    job = {
        "model": "tiny",
        "training_file": "file-1",
        "validation_file": "file-2",
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
        "metadata": {"topic": "tests"},
    }
    return SearchPlan(
        name="find",
        space=space or autopeft(SHAPE, groups=3, largest=16, longest=8),
        job=read_request(job),
        trials=trials,
        model=model,
        seed=seed,
        lease_s=lease_s,
    )


def invented(space: AnySpace, trial: Trial) -> Result:
    """Loss falls with every size and layer, differently, and rises with the distance from a rate of 2e-3; in S4's space
    it falls with every choice's number."""
    loss = _loss(space, trial.config) if isinstance(space, Space) else 3.0 - log1p(sum(trial.config.values()))
    return Result(values=(loss, float(trial.candidate.parameters)))


def _loss(space: Space, config: Config) -> float:
    sizes = [float((*term.searched[0].values, 0)[int(config[term.name])]) for term in space.terms]
    layers = [config[parameter.name] for parameter in space.parameters if parameter.name.startswith("layers_")]
    covered = sum(weight * layer for weight, layer in zip((1, 2, 4), layers, strict=True)) / 7
    gain = sum(weight * log1p(size) for weight, size in zip((0.3, 0.8, 0.2), sizes, strict=True))
    return 3.0 - 1.5 * (1 - exp(-covered * gain)) * exp(-((log10(config["learning_rate"]) + 2.7) ** 2))
