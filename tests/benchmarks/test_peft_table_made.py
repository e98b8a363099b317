"""A table as small as can be, made from nothing: its backbone, its shares, and what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from peft_table import backbone as own
from peft_table import finals, make, tasks
from peft_table import table as kept
from peft_table.studies import Studies


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Mapping[str, int] = {"autopeft": 2, "s4": 2}
    monkeypatch.setattr(own, "STEPS", 2)
    monkeypatch.setattr(own, "topics", {"grafts": "A graft is a shoot that a gardener sets into another plant. " * 40})
    for module in (make, kept):
        monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(make, "PACK", 2)
    monkeypatch.setattr(make, "TRAINED", 4)
    monkeypatch.setattr(tasks, "HELD_OUT", 4)


@pytest.mark.nightly  # two backwards through a real pack for each of its shares: 14 to 28 s
@pytest.mark.usefixtures("small")
def test_a_table_is_made_share_by_share_and_its_choices_again_on_other_seeds(tmp_path: Path) -> None:
    said: list[str] = []
    assert make.make(tmp_path, 0.0, said.append) is None and len(said) == 1
    found = make.make(tmp_path, 1e9, said.append)
    assert found is not None and len(said) == len(list(make.shares())) == 8
    assert found.training.shape == (4, 2, 2, 2) and found.validation.shape == (4, 2, 2, kept.LOOKS)
    assert np.isfinite(found.training).all() and np.isfinite(found.test).all()
    assert (found.validation[..., -1] < found.untrained[:, None]).all()  # every graft learnt something
    kept.save(found, tmp_path)
    assert kept.load(tmp_path).rows == found.rows
    chosen: Studies = {"s4, stopping | trivia | random, early-exit": {"0": {"chosen": 2}, "1": {"chosen": 3}}}
    again = finals.retrain(found, chosen, tmp_path, tmp_path / "finals.json", said.append)
    assert {task: {row: len(tests) for row, tests in rows.items()} for task, rows in again.items()} == {
        "trivia": {"2": 5, "3": 5}
    }
    assert len({*again["trivia"]["2"], *again["trivia"]["3"]}) > 5
