"""An error that grew by any amount does not hold."""

from __future__ import annotations

import pytest
import torch
from bf16_error import compare, errors, joined, report

BEFORE = {"bare, rel-L2": [1.0, 2.0, 3.0], "bare, largest": [4.0, 4.0, 4.0]}


def test_errors_are_relative_to_what_is_true_and_largest_text_by_text() -> None:
    true = {"bare/0": torch.tensor([3.0, 4.0]), "bare/1": torch.tensor([0.0, 2.0]), "mixed/0": torch.ones(1)}
    found = {"bare/0": torch.tensor([3.0, 4.5]), "bare/1": torch.tensor([-1.0, 2.0])}
    assert errors(found, true) == {"bare, rel-L2": [0.1, 0.5], "bare, largest": [0.5, 1.0]}


def test_tensors_are_joined_by_their_names_whatever_their_order() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])
    assert joined({"b": b, "a": a}).tolist() == joined({"a": a, "b": b}).tolist() == [1.0, 2.0, 3.0]


def test_medians_decide_and_equal_ones_hold() -> None:
    assert [row.holds for row in compare(BEFORE, BEFORE)] == [True, True]
    shrunk, grown = compare(BEFORE, {"bare, rel-L2": [9.0, 1.9, 1.0], "bare, largest": [4.0, 4.001, 4.001]})
    assert (shrunk.before, shrunk.after, shrunk.holds) == (2.0, 1.9, True)
    assert shrunk.ratio.median == pytest.approx(0.95)
    assert (grown.after, grown.holds) == (4.001, False)


def test_an_error_that_is_no_number_does_not_hold() -> None:
    nan = {"bare, rel-L2": [float("nan")] * 3, "bare, largest": [4.0] * 3}
    assert [row.holds for row in compare(BEFORE, nan)] == [False, True]


def test_the_exit_status_says_whether_all_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(compare(BEFORE, BEFORE), BEFORE, "abc") == 0
    assert report(compare(BEFORE, {**BEFORE, "bare, largest": [5.0] * 3}), BEFORE, "abc") == 1
    assert "abc" in capsys.readouterr().out
