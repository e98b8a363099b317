"""Samplers on invented problems: the same for the same trials, within conditions, and better for what they are told."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from polygraft.grafts.sites import ModelShape
from polygraft.tuning.objectives import Limit
from polygraft.tuning.plan import BadPlan, SearchPlan
from polygraft.tuning.samplers.choose import SamplerName
from polygraft.tuning.samplers.evolution import Evolution, mutated
from polygraft.tuning.samplers.optuna import OptunaSampler
from polygraft.tuning.samplers.spread import Spread
from polygraft.tuning.samplers.staged import S4_STAGES, Staged
from polygraft.tuning.space import Candidate
from polygraft.tuning.spaces.parameters import Config, check
from polygraft.tuning.spaces.s4 import STRATEGIES, S4Space, s4_space
from polygraft.tuning.spaces.which import which
from polygraft.tuning.study import Failure, NotYet, Result, Sampler, Stopped, Study, Trial, as_seen
from tests.tuning.plans import invented, plan_of
from tests.tuning.standin import SHAPE

FAST: tuple[SamplerName, ...] = ("random", "lhs", "tpe", "nsga2", "evolution")
FOUR_LAYERS = ModelShape("llama", layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=512)


def searched(plan: SearchPlan, trials: int, turn: int = 0) -> Study:
    """Four at once, told in an order of their own, another one for every `turn`; every seventh fails and every eleventh
    is stopped."""
    study = Study(plan.space, plan.objectives, plan.sampler, limits=plan.limits)
    running: list[Trial] = []
    while len(study.trials) < trials or running:
        with suppress(NotYet):
            while len(running) < 4 and len(study.trials) < trials:
                running.append(study.ask())
        trial = running.pop((turn + len(study.trials)) % len(running))
        if trial.number % 7 == 6:
            study.tell(trial.number, Failure(reason="lost"))
        elif trial.number % 11 == 10:
            study.tell(trial.number, Stopped(reason="behind", step=3, steps_total=9, loss=2.5))
        else:
            study.tell(trial.number, invented(plan.space, trial))
    return study


@pytest.mark.parametrize("name", FAST)
def test_every_suggestion_is_made_again_from_the_record_of_what_it_had_seen(name: SamplerName) -> None:
    plan = plan_of(26, model=name, seed=3)
    trials = searched(plan, 26).trials
    for trial in trials:
        again = plan.sampler.propose(as_seen(trials, trial.number), trial.attempt)
        assert again == trial.config, trial.number
    assert any(0 < len(trial.seen) < trial.number for trial in trials)


def test_a_generation_of_nsga2_is_the_same_whoever_ends_first() -> None:
    plan = plan_of(40, model="nsga2", seed=2)
    one, other = (searched(plan, 40, turn) for turn in (0, 1))
    assert [trial.config for trial in one.trials] == [trial.config for trial in other.trials]
    assert [trial.seen for trial in one.trials] != [trial.seen for trial in other.trials]


def test_a_gaussian_processs_suggestion_is_made_again_too() -> None:
    trials = searched(plan_of(8, seed=3), 8).trials
    plan = plan_of(9, model="gp", seed=3)
    study = Study(plan.space, plan.objectives, plan.sampler, trials=trials)
    trial = study.ask()
    assert plan.sampler.propose(as_seen(study.trials, trial.number), trial.attempt) == trial.config


@pytest.mark.parametrize("name", [*FAST, "gp"])
def test_in_a_conditional_space_every_proposal_has_the_parameters_that_are_there(name: SamplerName) -> None:
    space = which(SHAPE, only=("lora", "prefix", "ia3"))
    plan = plan_of(10, space=space, model=name)
    trials: list[Trial] = []
    for number in range(7 if name == "gp" else 24):
        config = plan.sampler.propose(trials, 0)
        check(space.parameters, config)
        loss = 1.0 + config["method"] + abs(config["learning_rate"] - 1)
        trials.append(trial_of(number, config, (loss, 10.0 + number)))
    assert len({trial.config["method"] for trial in trials}) > 1


def trial_of(number: int, config: Config, values: tuple[float, ...]) -> Trial:
    outcome = Result(values=values)
    return Trial(number=number, config=config, candidate=Candidate(f"{number}", 1e-3, 1), told=number, outcome=outcome)


def test_tpe_finds_the_method_that_is_best() -> None:
    space = which(SHAPE, only=("lora", "prefix", "ia3", "bitfit"))
    plan = replace(plan_of(40, space=space), minimise=("loss",))
    trials: list[Trial] = []
    for number in range(40):
        config = plan.sampler.propose(trials, 0)
        trials.append(trial_of(number, config, (2.0 - (config["method"] == 2),)))
    assert sum(trial.config["method"] == 2 for trial in trials[-20:]) >= 10  # 5 by chance


@pytest.mark.parametrize("name", ["tpe", "gp", "nsga2"])
def test_measured_limits_are_constraints_of_the_model(name: SamplerName) -> None:
    """Everything small is above the limit: proposals with it are larger than those without."""
    plan = plan_of(60, model=name)
    sampler = plan.sampler
    assert isinstance(sampler, OptunaSampler)
    known: list[Trial] = []
    for number in range(16):
        config = Spread(plan.space.parameters, 16, 1).propose(known, 0)
        known.append(trial_of(number, config, (3.0 - 0.01 * number, 100.0 + 100 * number)))
    limited = replace(sampler, limits=(Limit("loss", 2.9),))
    trial = limited._known(known[0])
    assert trial.constraints == {"loss": pytest.approx(0.1)}
    assert limited._known(known[15]).constraints == {"loss": pytest.approx(-0.05)}
    assert limited.propose(known, 0) != sampler.propose(known, 0)


def test_a_generation_of_nsga2_is_bred_from_the_one_before() -> None:
    plan = plan_of(48, model="nsga2", seed=1)
    trials = searched(plan, 48).trials
    first = [trial.values[0] for trial in trials[:16] if trial.values]
    last = [trial.values[0] for trial in trials[32:] if trial.values]
    assert np.median(last) < np.median(first)


def test_a_child_differs_from_its_parent_in_one_thing_and_what_hangs_on_it() -> None:
    space, chance = which(SHAPE, only=("lora", "ia3")), np.random.default_rng(0)
    parent: Config = {"method": 1, "learning_rate": 1.0}
    for _ in range(40):
        child = mutated(space.parameters, parent, chance)
        check(space.parameters, child)
        changed = {name for name in parent if name in child and child[name] != parent[name]}
        assert len(changed) == 1
        assert (child["method"] == 0) == ("lora.r" in child)


def test_the_oldest_die_though_they_be_the_best() -> None:
    parameters = plan_of().space.parameters
    evolution = Evolution(parameters, population=4, sample=4, seed=0)
    configs = [Spread(parameters, 8, 5).propose([None] * n, 0) for n in range(8)]  # type: ignore[list-item]
    trials = [trial_of(n, config, (float(n),)) for n, config in enumerate(configs)]
    child = evolution.propose(trials, 0)
    parent = trials[4].config  # the best of the last four
    assert sum(child[name] != parent[name] for name in parent) == 1


def staged_study(per_stage: int, best: dict[str, int]) -> tuple[Staged, list[Trial], S4Space]:
    space = s4_space(FOUR_LAYERS, most=4_000)
    staged = Staged(space.parameters, per_stage=per_stage, seed=2)
    trials: list[Trial] = []
    for number in range(per_stage * len(S4_STAGES) + 3):
        config = staged.propose(trials, 0)
        check(space.parameters, config)
        misses = sum(config.get(name) != value for name, value in best.items())
        trials.append(trial_of(number, config, (float(misses),)))
    return staged, trials, space


def test_the_staged_search_fixes_the_best_pattern_of_one_part_after_the_other() -> None:
    tuned = {f"tuned_{group}": 1 for group in (1, 2, 3, 4)}
    methods = {f"methods_{group}": STRATEGIES.index("AP") for group in (1, 2, 3, 4)}
    best = {"grouping": 3, "spending": 1, **tuned, **methods}
    staged, trials, space = staged_study(150, best)
    found = {name: value for stage in range(7) for name, value in staged.chosen(trials, stage).items()}
    assert found == best
    assert len({trial.config["grouping"] for trial in trials[:150]}) == 5
    assert {trial.config["grouping"] for trial in trials[150:]} == {3}
    assert {name: trials[-1].config[name] for name in best} == best
    assert "AP" not in space.candidate(trials[-1].config).peft and "prefix" in space.candidate(trials[-1].config).peft


def test_a_stage_without_results_holds_nothing_fast() -> None:
    space = s4_space(FOUR_LAYERS, most=4_000)
    staged = Staged(space.parameters, per_stage=2)
    lost = [replace(trial_of(n, {}, ()), outcome=Failure(reason="lost")) for n in range(2)]
    assert staged.chosen(lost, 0) == {}
    check(space.parameters, staged.propose(lost, 0))


def test_a_stage_waits_for_the_stage_before() -> None:
    staged = Staged(s4_space(FOUR_LAYERS, most=4_000).parameters, per_stage=2)
    running = replace(trial_of(0, {}, (1.0,)), outcome=None)
    staged.propose([running], 0)
    with pytest.raises(NotYet):
        staged.propose([running, trial_of(1, {}, (1.0,))], 0)


def test_the_staged_search_is_for_s4s_space() -> None:
    with pytest.raises(BadPlan, match="sampler: staged"):
        plan_of(model="staged")


def test_chance_and_hypercube_differ_in_how_they_cover_a_range() -> None:
    parameters = plan_of().space.parameters

    def rates(sampler: Sampler) -> list[float]:
        return sorted(float(sampler.propose([None] * n, 0)["learning_rate"]) for n in range(20))  # type: ignore[list-item]

    low, high = parameters[-1].low, parameters[-1].high
    edges = [low * (high / low) ** (slice / 20) for slice in range(21)]
    held = [sum(a <= rate <= b for rate in rates(Spread(parameters, 20, 4))) for a, b in pairwise(edges)]
    assert held == [1] * 20
    by_chance = [sum(a <= rate < b for rate in rates(Spread(parameters, 1, 4))) for a, b in pairwise(edges)]
    assert by_chance != held
