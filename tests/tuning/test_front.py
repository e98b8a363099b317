"""The drawing of a search."""

from __future__ import annotations

from pathlib import Path

import pytest

from polygraft.tuning.front import draw
from polygraft.tuning.study import Failure, Result, Study
from tests.tuning.plans import invented, plan_of


def study_of(trials: int) -> Study:
    plan = plan_of(trials)
    study = Study(plan.space, plan.objectives, plan.sampler)
    for number in range(trials):
        trial = study.ask()
        values = invented(plan.space, trial).values
        study.tell(number, Failure(reason="lost") if number == 2 else Result(values=values, loss_before=3.1))
    return study


@pytest.mark.parametrize("trials", [1, 12])
def test_a_search_is_drawn_as_a_png(tmp_path: Path, trials: int) -> None:
    path = tmp_path / "charts" / "front.png"
    draw(study_of(trials).trials, path, title="Grafts for a topic")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_without_a_result_there_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of 0 is complete"):
        draw((), tmp_path / "front.png")
