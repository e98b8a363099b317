"""The verdict on a supernet's search, on made-up losses."""

from __future__ import annotations

import pytest
from search_noah import Cell, told


def cell(ours: float, others: float, rows: list[int]) -> Cell:
    return {
        "supernet": {},
        "alone": {"losses": [4.0, 2.0, 3.0]},
        "tests": {"losses": [[ours, ours], [others, others]], "rows": rows},
    }


def test_a_search_is_told_with_its_loss_its_cost_and_what_a_random_graft_is_worth() -> None:
    (line,) = told({"trivia 0": cell(2.02, 2.0, [10, 100])})
    assert "+1.00% for 10.0% of the cost" in line and "the median graft by itself +50.00%" in line


@pytest.mark.parametrize(
    ("ours", "rows", "verdict"),
    [
        ([2.01, 2.01], [20, 100], "goal 1% and 20%, holds"),
        ([2.05, 2.05], [20, 100], "goal 1% and 20%, is not shown"),
        ([2.01, 2.01], [21, 100], "goal 1% and 20%, is not shown"),
        ([2.03, 1.97], [20, 100], "goal 1% and 20%, is not shown"),  # the mean is 0, and says nothing
    ],
)
def test_the_goal_is_of_a_bound_on_the_mean_loss_and_of_the_dearest_search(
    ours: list[float], rows: list[int], verdict: str
) -> None:
    lines = told({"trivia 0": cell(ours[0], 2.0, rows), "feelings 0": cell(ours[1], 2.0, [10, 100])})
    assert lines[-1].endswith(verdict)
