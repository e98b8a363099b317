"""Searches at equal cost, on losses that were made up: what each side may spend, and the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import search_quality
from peft_table.table import S4_BUDGET
from search_quality import FINALS, LORA, PER_STAGE, TRIALS, Bench, told

from polygraft.grafts.grammar import terms
from polygraft.tuning.samplers.staged import S4_STAGES
from polygraft.tuning.space import Candidate, count
from tests.tuning.standin import SHAPE


@dataclass(frozen=True)
class Invented(Bench):
    """Losses fall with parameters. Keeps what was trained."""

    backbone: Any = field(default_factory=lambda: SimpleNamespace(shape=SHAPE))
    data: Any = None
    trained: list[Candidate] = field(default_factory=list)

    def validated(self, candidates: Sequence[Candidate], seed: int) -> list[float]:
        self.trained.extend(candidates)
        return [1e6 / (1e5 + one.parameters) for one in candidates]

    def tested(self, candidates: Sequence[Candidate]) -> list[list[float]]:
        return [[1e6 / (1e5 + one.parameters)] * len(FINALS) for one in candidates]


def defaults(gap: float) -> Mapping[str, object]:
    """Of a search whose graft is so much worse on the test part than the best fixed default."""
    return {"searched": {"tests": [2.0 + gap, 2.2 + gap]}, "fixed": {"tests": [2.0, 2.2]}}


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ([-0.2, -0.21, -0.19], "-0.2000 ± 0.0248 over 3 searches, p = 0.000: better"),
        ([0.2, 0.21, 0.19], "+0.2000 ± 0.0248 over 3 searches, p = 1.000: not shown to be better"),
        ([-0.2, 0.1, -0.1], "not shown to be better"),
        ([-0.1, -0.1], "p = 1.000: not shown to be better"),  # no spread, no test
        ([-0.1], "-0.1000 (one search)"),
    ],
)
def test_a_search_is_better_where_a_one_sided_test_over_its_seeds_says_so(gaps: list[float], verdict: str) -> None:
    (line,) = told({f"defaults trivia {seed}": defaults(gap) for seed, gap in enumerate(gaps)})
    assert line.startswith("trivia: AutoPEFT's space against the best fixed default: ") and line.endswith(verdict)


def test_a_search_and_the_fixed_defaults_have_as_many_trials_within_as_many_parameters() -> None:
    bench = Invented()
    cell: Any = search_quality.defaults(bench, 0)
    searched, fixed = bench.trained[:TRIALS], bench.trained[TRIALS:]
    assert len(searched) == len(fixed) == TRIALS
    assert max(one.parameters for one in bench.trained) <= count(LORA, SHAPE)
    by_method = [
        {one.learning_rate for one in fixed if terms(one.peft)[0].name == m} for m in ("lora", "parallel", "prefix")
    ]
    assert [len(rates) for rates in by_method] == [TRIALS // 3] * 3
    assert (cell["searched"]["parameters"], cell["fixed"]["parameters"]) == tuple(
        max(one.parameters for one in side) for side in (searched, fixed)
    )
    assert len(cell["searched"]["tests"]) == len(FINALS)


def test_staged_and_random_search_have_as_many_trials_within_s4s_budget() -> None:
    bench = Invented()
    cell: Any = search_quality.stages(bench, 0)
    trained = bench.trained
    assert len(trained) == 2 * PER_STAGE * len(S4_STAGES) and max(one.parameters for one in trained) <= S4_BUDGET
    assert len(cell["best"]) == len(cell["median"]) == len(S4_STAGES)
    assert all(best <= median for best, median in zip(cell["best"], cell["median"], strict=True))
    assert cell["random"]["parameters"] == max(one.parameters for one in trained[len(trained) // 2 :])


def test_tasks_are_judged_by_themselves() -> None:
    lines = told({"defaults trivia 0": defaults(-0.1), "defaults feelings 0": defaults(0.3)})
    assert [line.rpartition(": ")[2] for line in lines] == ["-0.1000 (one search)", "+0.3000 (one search)"]


def test_every_stage_is_told_beside_its_median_and_the_last_design_beside_random_search() -> None:
    stages = range(1, len(S4_STAGES) + 1)
    cell = {
        "best": [[2.0, 2.2]] * len(stages),
        "median": [[2.0 + stage / 10, 2.2 + stage / 10] for stage in stages],
        "last": {"tests": [5.0]},
        "random": {"tests": [4.5]},
    }
    *lines, last = told({"stages trivia 0": cell})
    assert lines == [
        f"trivia: S4's stage {stage} ({names[0]}), best against median: -{stage / 10:.4f} (one search)"
        for stage, names in zip(stages, S4_STAGES, strict=True)
    ]
    assert last == "trivia: S4's last design against random search's best: +0.5000 (one search)"
