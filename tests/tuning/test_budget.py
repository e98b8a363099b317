"""What a search of nothing but data and a budget becomes."""

from __future__ import annotations

import pytest

from polygraft.grafts.sites import ModelShape
from polygraft.tuning.budget import BadBudget, chosen, trials_of
from polygraft.tuning.request import SearchRequest
from polygraft.tuning.space import Space

SMOLLM2 = ModelShape("llama", layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152)
FILES = {"name": "find", "training_file": "file-1", "validation_file": "file-2"}


@pytest.mark.parametrize(
    ("budget", "trials"), [("20m", 60), ("1h", 180), ("90s", 4), ("40 trials", 40), ("7 trials", 7), ("0.5h", 90)]
)
def test_a_budget_is_a_number_of_trials(budget: str, trials: int) -> None:
    assert trials_of(budget) == trials


@pytest.mark.parametrize(
    ("budget", "wrong"), [("soon", "budget: 'soon' is not one"), ("10s", "enough for 0 trials"), ("-3m", "is not one")]
)
def test_a_budget_that_is_none_is_refused(budget: str, wrong: str) -> None:
    with pytest.raises(BadBudget, match=wrong):
        chosen(budget, 100)


@pytest.mark.parametrize(
    ("budget", "first"), [("4 trials", "lora.r"), ("20 trials", "serial"), ("99 trials", "method")]
)
def test_more_trials_search_a_larger_space(budget: str, first: str) -> None:
    plan = chosen(budget, 1000)
    built = SearchRequest.model_validate({**FILES, **plan.options}).plan(backbone="smollm2", shape=SMOLLM2)
    assert isinstance(built.space, Space) and built.space.parameters[0].name == first
    assert built.trials == trials_of(budget) and built.startup < built.trials
    assert built.pruner == ("early-exit" if built.trials >= 12 else "none")


def test_what_was_chosen_is_said() -> None:
    said = "\n".join(chosen("20 trials", 1000).why)
    for word in ("20 trials", "256 of 1000 examples", "AutoPEFT", "tpe", "exit early"):
        assert word in said
