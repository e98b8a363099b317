"""Segments and the plans made of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polygraft.kernels.common.segments import Segment, Segments
from tests.kernels.cases import CASES, Case

ROWS, RANKS = 12, 9


def bounds(limit: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, limit), st.integers(0, limit)).map(lambda pair: (min(pair), max(pair)))


items = st.lists(
    st.tuples(bounds(ROWS), bounds(RANKS), st.sampled_from([0.5, 1.0])).map(lambda s: Segment(*s[0], *s[1], s[2])),
    max_size=6,
)


@given(items)
def test_runs_hold_every_segment_that_has_rows_and_ranks_in_order(found: list[Segment]) -> None:
    segments = Segments(tuple(found))
    assert unrolled(segments) == [s for s in found if s.rows and s.size]


def test_neighbours_of_one_shape_share_a_run() -> None:
    segments = CASES["equal shapes, many factors"].segments
    (run,) = segments.runs
    assert (run.start, run.rows, run.first, run.size, run.count) == (0, 4, 0, 3, 3)
    assert len(CASES["mixed ranks"].segments.runs) == 4


@given(items)
def test_a_stack_is_covered_when_each_of_its_rows_is_used_once_and_its_gaps_are_the_rows_of_nobody(
    found: list[Segment],
) -> None:
    uses = [sum(s.first <= row < s.last for s in found if s.rows) for row in range(RANKS)]
    segments = Segments(tuple(found))
    gaps = segments.gaps(RANKS)
    assert segments.covers(RANKS) == all(count == 1 for count in uses)
    assert (gaps is None) == any(count > 1 for count in uses)
    assert gaps is None or [row for gap in gaps for row in range(*gap)] == [
        r for r, count in enumerate(uses) if not count
    ]


@given(items)
def test_scales_say_what_each_row_weighs_in_each_stack_row(found: list[Segment]) -> None:
    factor, foreign = Segments(tuple(found)).scales_TR(ROWS, RANKS, torch.zeros(0))
    want = torch.zeros(ROWS, RANKS)
    for s in found:
        want[s.start : s.stop, s.first : s.last] += s.scale
    assert torch.equal(factor, want) and torch.equal(foreign, want == 0)


def test_scales_stay_wide_when_bf16_cannot_hold_them() -> None:
    like = torch.zeros(0, dtype=torch.bfloat16)
    exact, rounded = (Segments((Segment(0, 1, 0, 1, scale),)).scales_TR(1, 1, like)[0] for scale in (0.5, 1 / 3))
    assert (exact.dtype, rounded.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_factor_gives_the_same_bits_whatever_factors_its_neighbours_have(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 5).to(dtype)
    (shared,) = Segments(tuple(Segment(4 * i, 4 * i + 4, i, i + 1, 4 / 3) for i in range(3))).runs
    (mixed,) = Segments(tuple(Segment(4 * i, 4 * i + 4, i, i + 1, (4 / 3, 0.1, 7.0)[i]) for i in range(3))).runs
    assert mixed.scaled(x).dtype == dtype
    assert torch.equal(mixed.scaled(x)[0], shared.scaled(x)[0])


def test_every_batch_row_finds_its_vector_and_others_the_row_past_the_stack() -> None:
    segments = Segments((Segment(1, 3, 4, 5), Segment(4, 6, 0, 1)))
    assert segments.index_T(7, 5, torch.device("cpu")).tolist() == [5, 4, 4, 5, 0, 0, 5]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_runs_views_are_its_segments_rows(case: Case) -> None:
    x, w = torch.arange(case.rows).view(-1, 1), torch.arange(case.stack_rows).view(-1, 1)
    rows = [r.tolist() for run in case.segments.runs for r in run.batch(x).squeeze(2)]
    ranks = [r.tolist() for run in case.segments.runs for r in run.stack(w).squeeze(2)]
    present = [s for s in case.items if s.rows and s.size]
    assert rows == [list(range(s.start, s.stop)) for s in present]
    assert ranks == [list(range(s.first, s.last)) for s in present]


def unrolled(segments: Segments) -> list[Segment]:
    """The segments that the runs stand for."""
    return [
        Segment(
            run.start + i * run.rows,
            run.start + (i + 1) * run.rows,
            run.first + i * run.size,
            run.first + (i + 1) * run.size,
            scale,
        )
        for run in segments.runs
        for i, scale in enumerate(run.scales)
    ]
