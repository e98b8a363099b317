"""Optuna's study between two proposals: what it knows by and by is what it would know at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import pytest
from optuna.trial import FrozenTrial

from polygraft.tuning.objectives import LOSS, Limit, objective
from polygraft.tuning.samplers import optuna as samplers
from polygraft.tuning.samplers.optuna import OptunaSampler
from polygraft.tuning.space import LEARNING_RATE, Candidate
from polygraft.tuning.spaces.autopeft import autopeft
from polygraft.tuning.spaces.parameters import Config, LogUniform
from polygraft.tuning.spaces.which import which
from polygraft.tuning.study import Failure, Outcome, Result, Stopped, Trial, as_seen
from tests.tuning.standin import SHAPE

UNION = autopeft(SHAPE, groups=3, largest=16, longest=8).parameters
CONDITIONAL = which(SHAPE, only=("lora", "prefix", "ia3")).parameters
RATE = (LogUniform(LEARNING_RATE, 1e-4, 1e-1),)
BOTH = (LOSS, objective("parameters"))
MEASURED = (Limit("loss", 2.0),)
SAMPLERS = {
    "tpe": OptunaSampler(parameters=UNION, objectives=BOTH, limits=MEASURED),
    "tpe by groups": OptunaSampler(parameters=CONDITIONAL, objectives=(LOSS,)),
    "gp": OptunaSampler(parameters=RATE, objectives=(LOSS,), limits=MEASURED, model="gp"),
    "nsga2": OptunaSampler(parameters=UNION, objectives=(LOSS,), model="nsga2"),
}


def asked_and_told(sampler: OptunaSampler, count: int, propose: Callable[[list[Trial]], Config]) -> list[Trial]:
    """Three run at once, and the second of them is told; NSGA-II's are told before more are asked for."""
    trials: list[Trial] = []
    for number in range(count):
        running = [trial for trial in trials if trial.outcome is None]
        while len(running) > 2 or (running and sampler.model == "nsga2"):
            one = running.pop(1 % len(running))
            trials[one.number] = replace(one, outcome=outcome_of(one, len(sampler.objectives)))
        unseen = tuple(trial.number for trial in trials if trial.outcome is None)
        config = propose(trials)
        trials.append(Trial(number=number, config=config, candidate=Candidate("", 1.0, 1), told=0, unseen=unseen))
    return trials


def outcome_of(trial: Trial, objectives: int) -> Outcome:
    rate = trial.config[LEARNING_RATE]
    if trial.number % 7 == 6:
        return Failure(reason="lost")
    if trial.number % 5 == 4:
        return Stopped(reason="behind", step=trial.number, steps_total=40, loss=2.0 + rate)
    return Result(values=(1.5 + rate + 0.3 * (trial.number % 3), 10.0 + trial.number)[:objectives])


@pytest.mark.parametrize(("name", "count"), [("tpe", 24), ("tpe by groups", 24), ("gp", 6), ("nsga2", 40)])
def test_a_sampler_that_goes_on_proposes_to_the_bit_what_one_that_begins_does(name: str, count: int) -> None:
    kept = replace(SAMPLERS[name])

    def propose(trials: list[Trial]) -> Config:
        kept.propose(trials, 1)
        config = kept.propose(trials, 0)
        assert config == replace(kept).propose(trials, 0)
        return config

    trials = asked_and_told(kept, count, propose)
    number = count // 2 + 2  # of a past before the one that the sampler saw last
    assert kept.propose(as_seen(trials, number), 0) == trials[number].config


def test_a_study_is_told_of_each_trial_when_it_is_asked_and_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, bool]] = []
    known = OptunaSampler._known

    def counted(self: OptunaSampler, trial: Trial) -> FrozenTrial:
        told.append((trial.number, trial.outcome is not None))
        return known(self, trial)

    monkeypatch.setattr(OptunaSampler, "_known", counted)
    sampler = replace(SAMPLERS["tpe"])
    asked_and_told(sampler, 24, lambda trials: sampler.propose(trials, 0))
    assert len(told) == len(set(told)) > 24


def test_a_proposal_that_was_broken_off_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = replace(SAMPLERS["tpe"])
    trials = asked_and_told(sampler, 12, lambda trials: sampler.propose(trials, 0))
    with monkeypatch.context() as patched:
        patched.setattr(samplers, "projected", broken_off)  # a trial has been asked for by then
        with pytest.raises(KeyboardInterrupt):
            sampler.propose(trials, 0)
    assert sampler.propose(trials, 0) == replace(sampler).propose(trials, 0)


def broken_off(*_: object) -> NoReturn:
    raise KeyboardInterrupt
