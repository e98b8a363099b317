"""The plans of the GPU's launches: every row and rank done once, nothing written twice at a time."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.common.tiles import BranchTiles, Grid
from tests.kernels.cases import CASES, Case

CPU = torch.device("cpu")
bounds = st.tuples(st.integers(0, 150), st.integers(0, 150)).map(lambda pair: (min(pair), max(pair)))
segments = st.lists(st.tuples(bounds, bounds).map(lambda s: Segment(*s[0], *s[1])), max_size=6).map(
    lambda items: Segments(tuple(items))
)


@given(segments)
def test_a_shrink_does_every_row_and_rank_of_every_segment_once(segments: Segments) -> None:
    plan = BranchTiles.of(segments, CPU)
    for index, s in enumerate(present(segments)):
        cells = Counter(
            (row, rank)
            for grid in plan.shrink
            for segment, t, r in grid.tiles.tolist()
            if segment == index
            for row in range(t * grid.height, min((t + 1) * grid.height, s.rows))
            for rank in range(r * grid.width, min((r + 1) * grid.width, s.size))
        )
        assert cells == Counter((row, rank) for row in range(s.rows) for rank in range(s.size))


@given(segments)
def test_an_expand_does_every_row_once_and_an_outer_every_rank(segments: Segments) -> None:
    plan = BranchTiles.of(segments, CPU)
    for index, s in enumerate(present(segments)):
        for grids, column, total in ((plan.expand, 1, s.rows), (plan.outer, 2, s.size)):
            own = [(grid, tile) for grid in grids for tile in grid.tiles.tolist() if tile[0] == index]
            extent = own[0][0].height if column == 1 else own[0][0].width
            assert sorted(tile[column] for _, tile in own) == list(range(-(-total // extent)))


@given(segments)
def test_segments_that_write_the_same_rows_go_into_successive_launches_in_their_order(segments: Segments) -> None:
    plan, items = BranchTiles.of(segments, CPU), present(segments)
    for grids, ranges in (
        (plan.expand, [(s.start, s.stop) for s in items]),
        (plan.outer, [(s.first, s.last) for s in items]),
    ):
        launch = {tile[0]: number for number, grid in enumerate(grids) for tile in grid.tiles.tolist()}
        for later, (low, high) in enumerate(ranges):
            for earlier, (start, stop) in enumerate(ranges[:later]):
                if start < high and low < stop:
                    assert launch[earlier] < launch[later]


@given(segments)
def test_blocks_lie_one_after_the_other_without_padding(segments: Segments) -> None:
    plan, items = BranchTiles.of(segments, CPU), present(segments)
    offsets = [sum(s.rows * s.size for s in items[:i]) for i in range(len(items) + 1)]
    table = [[s.start, s.rows, s.first, s.size, offset] for s, offset in zip(items, offsets[:-1], strict=True)]
    assert (plan.table.tolist(), plan.hidden) == (table, offsets[-1])


@given(segments, st.integers(1, 150), st.integers(1, 150))
def test_a_tiles_extent_is_a_function_of_its_own_segment(segments: Segments, rows: int, rank: int) -> None:
    own = Segment(200, 200 + rows, 200, 200 + rank)
    alone, joined = BranchTiles.of(Segments((own,)), CPU), BranchTiles.of(Segments((*segments, own)), CPU)
    index = len(joined.table) - 1
    for grids, others in ((alone.shrink, joined.shrink), (alone.expand, joined.expand), (alone.outer, joined.outer)):
        assert tiles_of(0, grids) == tiles_of(index, others)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_disjoint_segments_need_a_launch_for_each_extent_only(case: Case) -> None:
    overlapping = case in (CASES["overlapping rows"], CASES["the same twice"])
    extents = Counter((grid.height, grid.width) for grid in BranchTiles.of(case.segments, CPU).expand)
    assert overlapping or all(count == 1 for count in extents.values())


def test_a_plan_is_made_once() -> None:
    segments = CASES["mixed ranks"].segments
    assert BranchTiles.of(segments, CPU) is BranchTiles.of(segments, CPU)


def tiles_of(segment: int, grids: tuple[Grid, ...]) -> set[tuple[int, ...]]:
    return {
        (grid.height, grid.width, *tile[1:]) for grid in grids for tile in grid.tiles.tolist() if tile[0] == segment
    }


def present(segments: Segments) -> list[Segment]:
    return [s for s in segments if s.rows and s.size]
