"""AutoPEFT's surrogate: the same for the same trials, better than chance, and nothing where BoTorch is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from polygraft.tuning.objectives import LOSS, Limit
from polygraft.tuning.plan import BadPlan
from polygraft.tuning.samplers import saas
from polygraft.tuning.samplers.saas import Saas, copula, installed
from polygraft.tuning.spaces.parameters import Choice, LogUniform, Whole, at_shares, check
from polygraft.tuning.study import Study, as_seen
from tests.tuning.plans import invented, plan_of
from tests.tuning.test_startup import PARAMETERS, hold

needs_botorch = pytest.mark.skipif(not installed(), reason="BoTorch, the extra saas, is not installed")


def study_of(trials: int, *, minimise: tuple[str, ...] = ("loss", "parameters"), seed: int = 0) -> Study:
    """As many trials, three at once."""
    plan = replace(plan_of(trials, model="lhs", seed=seed), model="saas", startup=6, minimise=minimise)
    study = Study(plan.space, plan.objectives, plan.sampler)
    while len(study.trials) < trials:
        trial = study.ask()
        if trial.number >= 2:
            told = study.trials[trial.number - 2]
            result = invented(plan.space, told)
            study.tell(told.number, replace(result, values=result.values[: len(minimise)]))
    return study


@needs_botorch
@pytest.mark.parametrize(
    "minimise", [pytest.param(("loss", "parameters"), marks=pytest.mark.nightly), ("loss",)], ids=len
)
def test_a_suggestion_is_made_again_from_the_record_of_what_it_had_seen(minimise: tuple[str, ...]) -> None:
    study = study_of(8, minimise=minimise)
    plan = replace(plan_of(8, model="lhs"), model="saas", startup=6, minimise=minimise)
    last = study.trials[-1]
    check(plan.space.parameters, last.config)
    assert any(trial.outcome is None for trial in as_seen(study.trials, last.number)), "trials are running"
    assert plan.sampler.propose(as_seen(study.trials, last.number), last.attempt) == last.config


@needs_botorch
@pytest.mark.nightly
def test_it_finds_lower_losses_than_chance() -> None:
    def best(trials: Study) -> float:
        return min(trial.values[0] for trial in trials.trials if trial.values)

    found = [best(study_of(26, minimise=("loss",), seed=seed)) for seed in range(3)]
    by_chance = []
    for seed in range(3):
        plan = plan_of(26, model="random", seed=seed)
        study = Study(plan.space, plan.objectives, plan.sampler)
        for _ in range(26):
            study.tell(study.ask().number, invented(plan.space, study.trials[-1]))
        by_chance.append(best(study))
    assert np.mean(found) < np.mean(by_chance)


def test_a_configuration_is_a_point_of_the_unit_cube() -> None:
    parameters = (Whole("w", 0, 4), Choice("c", 3), LogUniform("l", 1e-4, 1e-2), Whole("there", 2, 2))
    point = Saas(parameters=parameters, objectives=()).point({"w": 1, "c": 2, "l": 1e-3, "there": 2})
    assert point == pytest.approx([0.25, 0, 0, 1, 0.5, 0.5])


def test_the_copula_of_values_is_their_order_and_nothing_else() -> None:
    values = copula([3.0, 1.0, 100.0, 1.0])
    assert values[1] == values[3] < values[0] < values[2]
    assert values.tolist() == pytest.approx(copula([0.3, 0.1, 0.4, 0.1]).tolist())


@needs_botorch
def test_measured_limits_are_refused() -> None:
    with pytest.raises(BadPlan, match="saas takes no measured limits"):
        replace(plan_of(8), model="saas", limits=(Limit("loss", 2.0),))


def test_without_botorch_the_sampler_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saas, "installed", lambda: False)
    with pytest.raises(BadPlan, match=r"polygraft\[saas\]"):
        replace(plan_of(8), model="saas")


def test_the_model_proposes_from_its_first_trial_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Saas, "_acquisition", lambda *_: None)
    monkeypatch.setattr(Saas, "_best", lambda *_: at_shares(PARAMETERS, [0.5] * len(PARAMETERS)))
    hold(Saas(parameters=PARAMETERS, objectives=(LOSS,), startup=3), monkeypatch)
