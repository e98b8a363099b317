"""Which trials are stopped, on curves that were made up; and that the same curves give the same stops again."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import exp

import numpy as np
import pytest
from scipy.stats import norm as normal  # type: ignore[import-untyped]

from polygraft.tuning.pruners.choose import pruner
from polygraft.tuning.pruners.curves import Curve, Pruner, means, ranked
from polygraft.tuning.pruners.early_exit import VARIANCES, EarlyExit, chance_below
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
            watch.see(trial_of(number), known(number), losses, STEPS)
            stopped, step = watch.judge(trial_of(number), STEPS), step + 3
        curve = watch.curve(number)
        ended.append(trial_of(number, stopped or Result(values=(level,), curve=curve)))
        watch.ended(ended[-1])
    return ended


def test_rungs_are_shares_of_the_steps_and_the_last_is_the_end() -> None:
    assert Halving().looks(0, 90) == (10, 30, 90)
    assert Halving().looks(0, 2) == (1, 2)
    assert EarlyExit().looks(0, 96) == tuple(range(2, 97, 2))
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
    curves = {0: Curve((1.0,)), 1: Curve((2.0, 1.9)), 2: Curve((3.0, 2.0, 1.0), end=1.0), 3: Curve((2.5,))}
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


def test_the_chance_is_that_of_the_model_by_integration() -> None:
    """Over the level and the logarithm of what is left over's deviation, for each pair of prior variances."""
    chance = np.random.default_rng(2)
    for n, looks in ((4, 1), (5, 4), (9, 12)):
        points = chance.normal(3.0, 0.5, (n + 1, looks)), chance.normal(0.0, 1.0, (n + 1, 2))
        blocks = [x - x[:n].mean(axis=0) for x in points]
        y = points[0][:n] @ chance.normal(0.0, 0.5, looks) + points[1][:n, 0] + chance.normal(0.0, 0.3, n)
        level = float(y.min())
        away, log_sigma = np.meshgrid(np.linspace(-5, 5, 101), np.linspace(-8, 4, 601))
        sigma, whole, under = np.exp(log_sigma), 0.0, 0.0
        mu = y.mean() + away * sigma  # d mu = sigma d away
        for scales in product(VARIANCES, repeat=2):
            over = np.eye(n + 1) + sum(s * x @ x.T / x.shape[1] for s, x in zip(scales, blocks, strict=True))
            white = np.linalg.inv(np.linalg.cholesky(over[:n, :n]))
            ones, values = white @ np.ones(n), white @ y
            squares = values @ values - 2 * mu * (ones @ values) + mu**2 * (ones @ ones)
            density = np.linalg.det(white) * sigma ** (1 - n) * np.exp(-squares / sigma**2 / 2)
            weights = np.linalg.solve(over[:n, :n], over[:n, n])
            expected, variance = mu + weights @ y - mu * weights.sum(), over[n, n] - weights @ over[:n, n]
            whole += density.sum()
            under += (density * normal.cdf((level - expected) / (sigma * variance**0.5))).sum()
        found = chance_below(level, [(x[:n], x[n]) for x in blocks], y.tolist())
        assert found == pytest.approx(under / whole, rel=1e-4)


def test_the_chance_follows_a_line_and_nothing_follows_from_three_or_from_equal_ends() -> None:
    x, y = np.array([[-1.5], [-0.5], [0.5], [1.5]]), [1.0, 3.0, 5.0, 7.0]
    assert chance_below(8.0, [(x, np.array([3.5]))], y) == pytest.approx(0.0, abs=0.02)  # the line says 11
    assert chance_below(14.0, [(x, np.array([3.5]))], y) == pytest.approx(1.0, abs=0.02)
    assert chance_below(8.0, [(x[:3], np.array([3.5]))], y[:3]) is None
    assert chance_below(8.0, [(x, np.array([3.5]))], [2.0] * 4) is None


def test_rate_and_size_say_what_curves_do_not() -> None:
    """A rate whose trials have ended high is not waited for; what is equal in all that ended says nothing."""
    chance = np.random.default_rng(5)
    rates = chance.uniform(-3.0, 0.0, 12)
    curves = {
        number: Curve((3.0 + float(chance.normal(0, 0.1)),), (), (rate, 2.0), 1.0 + rate**2)
        for number, rate in enumerate(rates.tolist())
    }
    curves |= {12: Curve((3.5,), (), (-3.0, 2.0)), 13: Curve((3.5,), (), (0.0, 2.0)), 14: Curve((3.5,), (), (0.0, 9.0))}
    stopped = [number for number in (12, 13, 14) if EarlyExit().reason_to_stop(curves, number)]
    assert stopped == [12]


def test_of_curves_that_do_not_cross_the_best_is_never_stopped() -> None:
    """Whatever their shapes, whoever has ended, and at whatever look."""
    chance = np.random.default_rng(3)
    for _ in range(50):
        n, looks = int(chance.integers(2, 16)), int(chance.integers(1, 10))
        losses = np.sort(chance.exponential(1.0, (n, looks + 1)), axis=0) ** chance.uniform(0.2, 3.0)
        ended = {number: Curve(tuple(row[:-1]), end=row[-1]) for number, row in enumerate(losses.tolist()) if number}
        for look in range(1, looks + 1):
            curves = {**ended, 0: Curve(tuple(losses[0, :look].tolist()))}
            assert EarlyExit().reason_to_stop(curves, 0) is None


def test_who_starts_worse_but_ends_better_is_told_from_who_is_worse() -> None:
    """The end is the last loss less the first: who rises first ends lowest, as with a high rate that decays."""
    chance = np.random.default_rng(4)
    curves = {}
    for number in range(12):
        first, second = (float(3 + chance.normal(0, 0.3)) for _ in range(2))
        curves[number] = Curve((first, second), end=4 + second - first)
    best = min(curve.end for curve in curves.values() if curve.end is not None)
    rises, is_worse = Curve((5.0, 2.9 + best - 2.0)), Curve((3.0, 4.0 + best - 3.0 + 1.5))
    assert EarlyExit().reason_to_stop({**curves, 12: rises}, 12) is None
    assert EarlyExit().reason_to_stop({**curves, 12: is_worse}, 12) is not None


def test_hopeless_trials_exit_early_and_the_best_never() -> None:
    levels = [1.5, 1.0, 2.0, 1.8, 1.2, 2.5, 3.0, 0.9, 2.8, 2.2, 2.6, 2.9, 0.8]
    ended = run(EarlyExit(), levels)
    stopped = {trial.number for trial in ended if isinstance(trial.outcome, Stopped)}
    assert stopped >= {5, 6, 8, 10, 11} and not stopped & {0, 1, 2, 3, 7, 12}  # 7 and 12 beat all before them
    steps = [trial.outcome.step for trial in ended if isinstance(trial.outcome, Stopped)]
    assert max(steps) <= STEPS // 2


def test_where_curves_say_nothing_about_ends_nobody_is_stopped() -> None:
    chance = np.random.default_rng(4)
    curves = {
        n: Curve((3.0, 2.5 + float(chance.random()), *([2.0] * 7), 1.0), end=1.0 + float(chance.random()))
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
    again.see(trial_of(5), (), losses, STEPS)
    assert again.judge(trial_of(5), STEPS) == ended[5].outcome


def test_trials_that_come_to_a_look_together_are_judged_beside_all_of_them() -> None:
    watch = Watch(Halving(), (), {})
    trials = [trial_of(number) for number in range(3)]
    for trial, level in zip(trials, (3.0, 2.0, 1.0), strict=True):
        watch.see(trial, (), dict.fromkeys(range(1, 31), level), STEPS)
    assert all(watch.due(trial.number, 30, STEPS) for trial in trials)
    stopped = [watch.judge(trial, STEPS) for trial in trials]
    assert [one and one.step for one in stopped] == [10, 10, None], "the first to be judged, too, at its first look"
    assert stopped[0] is not None and stopped[0].curve == (3.0,)
    assert not watch.due(2, 30, STEPS) and watch.due(2, STEPS, STEPS)


def test_a_failed_trial_leaves_no_curve_to_be_compared_with() -> None:
    watch = Watch(Halving(), (), {})
    watch.see(trial_of(0), (), dict.fromkeys(range(1, 31), 1.0), STEPS)
    assert watch.curve(0) == (1.0, 1.0)
    watch.ended(trial_of(0, Failure(reason="lost")))
    assert watch.curve(0) == ()
