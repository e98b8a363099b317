"""Optuna's samplers on an invented problem."""

from __future__ import annotations

from dataclasses import replace
from math import log2

from polygraft.tuning.plan import SearchPlan
from polygraft.tuning.study import Failure, Study, Trial, pareto
from tests.tuning.plans import invented, plan_of


def study_of(plan: SearchPlan, trials: tuple[Trial, ...] = ()) -> Study:
    return Study(plan.space, plan.objectives, plan.sampler, trials=trials)


def searched(plan: SearchPlan) -> Study:
    """At most `concurrency` at once, told in the order they were asked in; trial 5 fails."""
    study = study_of(plan)
    running: list[Trial] = []
    while len(study.trials) < plan.trials or running:
        while len(running) < plan.concurrency and len(study.trials) < plan.trials:
            running.append(study.ask())
        trial = running.pop(0)
        study.tell(trial.number, Failure(reason="lost") if trial.number == 5 else invented(plan.space, trial))
    return study


def test_of_twelve_trials_four_at_once_eight_are_asked_after_results_were_told() -> None:
    told = [trial.told for trial in searched(plan_of()).trials]
    assert told == [0, 0, 0, 0, 1, 2, 3, 4, 5, 5, 6, 7]


def test_the_same_seed_proposes_the_same_trials_and_another_seed_others() -> None:
    one, other = searched(plan_of(8)), searched(plan_of(8))
    assert one.trials == other.trials
    assert searched(plan_of(8, seed=1)).trials != one.trials


def test_the_gaussian_process_proposes_the_same_for_the_same_trials() -> None:
    trials = searched(plan_of(5)).trials
    one, other = (study_of(plan_of(model="gp"), trials=trials).ask() for _ in range(2))
    assert one == other
    assert one.candidate not in {trial.candidate for trial in trials}


def test_a_study_that_goes_on_from_its_trials_proposes_what_it_would_have_proposed() -> None:
    whole = searched(plan_of()).trials
    halves = study_of(plan_of(), trials=tuple(replace(trial, outcome=None) for trial in whole[:4]))
    halves.tell(0, invented(halves.space, whole[0]))
    assert halves.ask() == replace(whole[4], outcome=None)


def test_trials_that_still_run_change_what_is_proposed() -> None:
    known, rest = searched(plan_of()).trials[:6], searched(plan_of()).trials[6:9]
    lost = tuple(replace(trial, outcome=Failure(reason="lost")) for trial in rest)
    running = tuple(replace(trial, outcome=None) for trial in rest)
    proposed = [study_of(plan_of(), trials=(*known, *others)).ask().config for others in (lost, running)]
    assert proposed[0] != proposed[1]


def test_the_front_is_right_and_a_model_beats_chance() -> None:
    plan = plan_of(24)
    trials = searched(plan).trials
    front = pareto(trials)
    assert [trial.values[1] for trial in front] == sorted(trial.candidate.parameters for trial in front)  # type: ignore[index]
    losses = [trial.values[0] for trial in front]  # type: ignore[index]
    assert losses == sorted(losses, reverse=True)
    by_chance = pareto(searched(replace(plan, startup=24)).trials)
    assert covered(front) > covered(by_chance)


def test_the_first_trials_cover_the_range_of_every_parameter() -> None:
    study = study_of(plan_of())
    rates = sorted(study.ask().config["learning_rate"] for _ in range(4))
    low, high = study.space.learning_rate.low, study.space.learning_rate.high
    quarters = [low * (high / low) ** (quarter / 4) for quarter in range(5)]
    assert all(first <= rate <= last for first, rate, last in zip(quarters, rates, quarters[1:], strict=False))


def covered(front: tuple[Trial, ...]) -> float:
    """Area over (log2 parameters, loss) that the front dominates, up to a loss of 3 and a million parameters."""

    area, worst = 0.0, 3.0
    for trial in front:
        assert trial.values is not None
        loss, size = trial.values
        area += (20 - log2(size)) * max(0.0, worst - loss)
        worst = min(worst, loss)
    return area
