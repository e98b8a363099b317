"""Which trials are stopped, on curves that were made up; and that the same curves give the same stops again."""

from __future__ import annotations

from collections.abc import Callable
from math import exp

import numpy as np
import pytest

from polygraft.tuning.pruners.choose import pruner
from polygraft.tuning.pruners.curves import Curve, Pruner, means, ranked
from polygraft.tuning.pruners.early_exit import EarlyExit, lower_bound
from polygraft.tuning.pruners.halving import Halving
from polygraft.tuning.pruners.watch import Watch
from polygraft.tuning.space import Candidate
from polygraft.tuning.study import Failure, Result, Stopped, Trial

STEPS = 90


def trial_of(number: int, outcome: Result | Stopped | Failure | None = None) -> Trial:
    return Trial(number=number, config={}, candidate=Candidate(f"lora({number + 1})", 1e-3, 1), told=0, outcome=outcome)


def loss_at(step: int, level: float, pace: float = 20.0) -> float:
    """What training brings down to `level`, with noise that all trials share, as they share the tokens of a step."""
    noise = 0.05 * float(np.random.default_rng(step).standard_normal())
    return level + (4.0 - level) * exp(-step / pace) + noise


def run(rule: Pruner, levels: list[float], known: Callable[[int], tuple[float, ...]] = lambda _: ()) -> list[Trial]:
    """All trials one after the other, reported three steps at a time."""
    watch, ended = Watch(rule, (), {}), list[Trial]()
    for number, level in enumerate(levels):
        stopped, step = None, 0
        while stopped is None and step < STEPS:
            losses = {step + i: loss_at(step + i, level) for i in (1, 2, 3)}
            stopped, step = watch.judge(trial_of(number), known(number), losses, STEPS), step + 3
        curve = watch.curve(number)
        ended.append(trial_of(number, stopped or Result(values=(level,), curve=curve)))
        watch.ended(ended[-1])
    return ended


def test_rungs_are_shares_of_the_steps_and_the_last_is_the_end() -> None:
    assert Halving().looks(0, 90) == (10, 30, 90)
    assert Halving().looks(0, 2) == (1, 2)
    assert EarlyExit().looks(0, 90) == (9, 18, 27, 36, 45, 54, 63, 72, 81, 90)
    assert EarlyExit().looks(0, 3) == (1, 2, 3)


def test_means_are_over_the_steps_between_looks_that_have_been_reached() -> None:
    losses = {1: 1.0, 2: 3.0, 3: 5.0, 4: 7.0, 5: 9.0}
    assert means(losses, (2, 4, 8)) == (2.0, 6.0)
    assert means({}, (2, 4)) == ()


def test_of_those_at_a_rung_the_best_third_goes_on() -> None:
    curves = {number: Curve((float(number),)) for number in range(6)}
    kept = [number for number in curves if Halving().reason_to_stop(curves, number) is None]
    assert kept == [0, 1]
    assert Halving().reason_to_stop(curves, 2) == "number 3 of 6 at rung 1, of which 2 go on"


def test_the_first_at_a_rung_go_on_since_nobody_is_waited_for() -> None:
    assert Halving().reason_to_stop({0: Curve((9.0,)), 1: Curve((1.0,))}, 0) is None


def test_who_reached_a_rung_counts_though_it_was_stopped_there_or_beyond() -> None:
    curves = {0: Curve((1.0,)), 1: Curve((2.0, 1.9)), 2: Curve((3.0, 2.0, 1.0), finished=True), 3: Curve((2.5,))}
    assert Halving().reason_to_stop(curves, 3) is not None
    assert Halving().reason_to_stop(curves, 2) is None


def test_a_trial_that_is_worse_but_smaller_than_all_others_goes_on() -> None:
    curves = {number: Curve((float(number),), (10.0 - (number == 5),)) for number in range(6)}
    assert Halving().reason_to_stop(curves, 5) is None
    assert Halving().reason_to_stop(curves, 4) is not None


def test_ranks_are_fronts_from_the_best_on() -> None:
    points = {0: (3.0, 1.0), 1: (1.0, 3.0), 2: (2.0, 3.0), 3: (4.0, 4.0)}
    assert ranked(points) == [1, 0, 2, 3]


def test_hyperbands_brackets_judge_later_and_only_among_themselves() -> None:
    rule = pruner("hyperband")
    assert isinstance(rule, Halving) and rule.brackets == 3
    curves = {number: Curve((float(number),)) for number in range(12)}
    judged = [number for number in curves if rule.reason_to_stop(curves, number)]
    assert judged == [3, 6, 9]  # of bracket 0 the best of 0, 3, 6 and 9 goes on
    second = {number: Curve((0.0, float(number))) for number in range(1, 12, 3)}
    assert [number for number in second if rule.reason_to_stop(second, number)] == [4, 7, 10]


def test_the_lower_bound_is_that_of_a_regressions_prediction() -> None:
    """By hand: y = x + (1, -2, 1) at x = 1, 2, 3; residual variance 6 on one degree of freedom."""
    pairs = [(1.0, 2.0), (2.0, 0.0), (3.0, 4.0)]
    bound = lower_bound(pairs, 2.0, 0.25)
    assert bound == pytest.approx(2.0 - 1.0 * (6 * (1 + 1 / 3)) ** 0.5)  # t(0.75, 1) = 1
    assert lower_bound(pairs[:2], 2.0, 0.25) is None
    assert lower_bound([(1.0, 2.0)] * 5, 2.0, 0.25) is None


def test_hopeless_trials_exit_early_and_the_best_never() -> None:
    levels = [1.5, 1.0, 2.0, 1.8, 1.2, 2.5, 3.0, 0.9, 2.8, 2.2, 2.6, 2.9, 0.8]
    ended = run(EarlyExit(), levels)
    stopped = {trial.number for trial in ended if isinstance(trial.outcome, Stopped)}
    assert stopped >= {5, 6, 8, 10, 11} and not stopped & {0, 1, 2, 3, 7, 12}  # 7 and 12 beat all before them
    steps = [trial.outcome.step for trial in ended if isinstance(trial.outcome, Stopped)]
    assert max(steps) <= STEPS // 2


def test_what_starts_late_but_overtakes_is_known_from_those_that_did_before() -> None:
    """Gaps now say nothing about gaps at the end: nobody is stopped."""
    chance = np.random.default_rng(4)
    curves = {
        n: Curve((3.0, 2.5 + float(chance.random()), *([2.0] * 7), 1.0 + float(chance.random())), finished=True)
        for n in range(12)
    }
    curves[12] = Curve((3.0, 3.4))
    assert EarlyExit().reason_to_stop(curves, 12) is None


def test_a_trial_smaller_than_all_that_ended_is_compared_with_none_of_them() -> None:
    levels = [1.0, 1.2, 1.4, 1.6, 1.8, 3.5]
    assert isinstance(run(EarlyExit(), levels)[5].outcome, Stopped)
    ended = run(EarlyExit(), levels, lambda number: (1.0 if number == 5 else 2.0,))
    assert isinstance(ended[5].outcome, Result)


@pytest.mark.parametrize("name", ["halving", "hyperband", "early-exit"])
def test_the_same_curves_stop_the_same_trials_again_and_most_steps_are_saved(name: str) -> None:
    rule = pruner(name)  # type: ignore[arg-type]
    assert rule is not None
    chance = np.random.default_rng(0)
    levels = [1.0 + 2 * float(chance.random()) for _ in range(40)]
    ended = run(rule, levels)
    assert ended == run(rule, levels)
    spent = sum(trial.outcome.step if isinstance(trial.outcome, Stopped) else STEPS for trial in ended)
    assert spent < 0.8 * STEPS * len(levels)
    best = min(range(len(levels)), key=lambda number: levels[number])
    assert isinstance(ended[best].outcome, Result)


def test_a_driver_that_starts_again_goes_on_from_the_curves_in_the_record() -> None:
    levels = [1.5, 1.0, 2.0, 1.8, 1.2, 3.0]
    ended = run(EarlyExit(), levels)
    again = Watch(EarlyExit(), ended[:5], {})
    losses = {step: loss_at(step, levels[5]) for step in range(1, STEPS)}
    assert again.judge(trial_of(5), (), losses, STEPS) == ended[5].outcome


def test_a_failed_trial_leaves_no_curve_to_be_compared_with() -> None:
    watch = Watch(Halving(), (), {})
    watch.judge(trial_of(0), (), dict.fromkeys(range(1, 31), 1.0), STEPS)
    assert watch.curve(0) == (1.0, 1.0)
    watch.ended(trial_of(0, Failure(reason="lost")))
    assert watch.curve(0) == ()
