"""When a sampler's model proposes in place of chance, and that it has a value for every kind of parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from polygraft.tuning.objectives import LOSS
from polygraft.tuning.samplers.evolution import Evolution
from polygraft.tuning.samplers.optuna import OptunaSampler
from polygraft.tuning.samplers.spread import Spread
from polygraft.tuning.space import Candidate
from polygraft.tuning.spaces.parameters import Choice, Config, LogUniform, Parameter, Uniform, Whole, check
from polygraft.tuning.study import MODEL_ATTEMPTS, Result, Sampler, Trial

PARAMETERS: tuple[Parameter, ...] = (
    Choice("kind", 2),
    Uniform("share", 0.5, 2.0, when=("kind", (0, 1))),
    LogUniform("rate", 1e-4, 1e-2),
    Whole("r", 2, 9),
)
SAMPLERS = {
    "tpe": OptunaSampler(parameters=PARAMETERS, objectives=(LOSS,), startup=3),
    "evolution": Evolution(parameters=PARAMETERS, population=3),
}


def hold(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a sampler whose model proposes from trial 3 on, and chance before it and at the last attempts."""
    drawn, real = list[int](), Spread.propose

    def propose(spread: Spread, trials: Sequence[Trial], attempt: int) -> Config:
        drawn.append(len(trials))
        return real(spread, trials, attempt)

    trials = list[Trial]()
    for number in range(3):
        config = real(Spread(PARAMETERS, 3), trials, 0)
        told = Result(values=(1.0 + number,), loss=1.0)
        asked = Trial(number=number, config=config, candidate=cast("Candidate", None), told=number, outcome=told)
        trials.append(asked)
    monkeypatch.setattr(Spread, "propose", propose)
    proposed: list[Any] = [sampler.propose(trials[:2], 0), sampler.propose(trials, 0)]
    assert drawn == [2]
    proposed.append(sampler.propose(trials, MODEL_ATTEMPTS))
    assert drawn == [2, 3]
    for config in proposed:
        check(PARAMETERS, config)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_a_model_proposes_from_its_first_trial_on(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(sampler, monkeypatch)
