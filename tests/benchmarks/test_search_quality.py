"""The verdicts on searches at equal cost, on made-up test losses."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from search_quality import told

from polygraft.tuning.samplers.staged import S4_STAGES


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
