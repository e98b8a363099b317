"""The benchmark of searches: what is asked of every arm."""

from __future__ import annotations

import pytest
from search_cells import Cell
from search_work import ETA, ROWS, TRIALS, request, steps_of, trials_of

from polygraft.tuning.pruners.choose import pruner
from tests.tuning.standin import SHAPE


@pytest.mark.parametrize(("tokens", "batch", "steps"), [(20_000, 1, 315), (1_000, 1, 18), (20_000, 8, 36), (1, 1, 9)])
def test_a_trial_has_about_so_many_tokens_in_steps_that_both_sides_cut_alike(
    tokens: int, batch: int, steps: int
) -> None:
    assert steps_of(tokens, batch) == steps
    rule = pruner("halving")
    assert rule is not None and rule.looks(0, steps) == (steps // ETA**2, steps // ETA, steps)


def test_rivals_train_the_trials_that_the_service_will_ask_for() -> None:
    bodies = (request(1, halving=halving, training_file="a", validation_file="b") for halving in (False, True))
    found = [list(trials_of(body, SHAPE)) for body in bodies]
    assert found[0] == found[1] and len({(one.rank, one.modules, one.learning_rate) for one in found[0]}) == TRIALS
    for one in found[0]:
        width = {"q_proj": 64 + 64, "k_proj": 64 + 32, "v_proj": 64 + 32, "o_proj": 64 + 64}
        width |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 64 + 96)
        assert one.parameters == SHAPE.layers * one.rank * sum(width[name] for name in one.modules)


def test_a_makespan_is_claimed_as_a_speed_and_a_batch_of_eight_claims_nothing() -> None:
    goals = {goal.id: goal for goal in Cell("long", 20_000, 1).goals}
    assert goals["search.long.speed_tune"].goal == pytest.approx(1 / 0.55)
    assert goals["search.long.speed_optuna"].goal == pytest.approx(2.5)
    assert goals["search.long.volume_tune"].goal == 0.98
    assert goals["search.long.speed_tune_reuse"].op is None
    assert not any(goal.op for goal in Cell("short", 1_000, 8).goals)
    assert "optuna" not in [arm.name for arm in Cell("halving", 20_000, 1).arms]
    assert ROWS == 64
