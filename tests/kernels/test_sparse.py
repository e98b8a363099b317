"""The sparse op: equal to its reference for entries and for rows, and every segment a function of itself alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.sparse import op, reference
from polygraft.kernels.sparse.op import sparse
from polygraft.kernels.sparse.order import SparseIndex
from tests.kernels.compare import TOLERANCE, Results, assert_as_good_as_steps, assert_close, assert_equal, run

# (rows, entries or rows of S, segments)
CASES = {
    "one row": (1, 3, (Segment(0, 1, 0, 3, 0.5),)),
    "63 rows": (63, 40, (Segment(0, 63, 0, 40),)),
    "uncovered rows and entries": (65, 30, (Segment(1, 2, 20, 25), Segment(7, 64, 2, 11, 1.3))),
    "empty segments": (8, 9, (Segment(0, 0, 0, 2), Segment(0, 5, 2, 2), Segment(0, 8, 2, 7, 0.9))),
    "overlapping": (20, 12, (Segment(0, 12, 0, 8), Segment(5, 20, 4, 12, 0.3))),
    "nothing": (4, 3, ()),
}
KINDS = {"entries": 2, "rows": 1}
D_IN, D_OUT = 33, 47


@pytest.mark.parametrize("indices", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_equal_the_reference(
    case: tuple[int, int, tuple[Segment, ...]], dtype: torch.dtype, indices: int
) -> None:
    rows, count, items = case
    inputs, index, upstream = tensors(rows, count, dtype, indices)
    got = run(sparse, inputs, index, Segments(items), upstream=upstream)
    want = run(reference.sparse, inputs, index, Segments(items), upstream=upstream)
    want = {name: want.get(name, torch.zeros_like(inputs[name[2:]]) if "." in name else got[name]) for name in got}
    got = {name: got.get(name, torch.zeros_like(want[name])) for name in want}
    assert_close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("indices", KINDS.values(), ids=KINDS.keys())
def test_bf16_is_as_good_as_the_obvious_steps(indices: int) -> None:
    inputs, index, upstream = tensors(65, 40, torch.bfloat16, indices)
    segments = Segments((Segment(0, 65, 0, 40, 0.7),))
    got = run(sparse, inputs, index, segments, upstream=upstream)
    want = run(reference.sparse, inputs, index, segments, upstream=upstream)
    truth = run(reference.sparse, inputs, index, segments, upstream=upstream, dtype=torch.float64)
    assert_as_good_as_steps(got, want, truth)


def test_an_index_given_twice_counts_twice() -> None:
    x, y, v = torch.ones(2, 3), torch.zeros(2, 4), torch.tensor([[2.0], [5.0]])
    out = sparse(x, y, v, SparseIndex(torch.tensor([[1, 2], [1, 2]])), Segments((Segment(0, 2, 0, 2),)))
    assert out[:, 1].tolist() == [7.0, 7.0] and out.count_nonzero() == 2


def test_entries_taken_in_pieces_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, index, upstream = tensors(9, 40, torch.float32, 2)
    segments = Segments((Segment(0, 9, 0, 40),))
    whole = run(sparse, inputs, index, segments, upstream=upstream)
    monkeypatch.setattr(op, "_PIECE", 63)
    assert_equal(run(sparse, inputs, index, segments, upstream=upstream), whole)


@pytest.mark.parametrize("indices", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 65])
def test_a_segments_bits_do_not_change_when_others_join_whatever_they_hold(
    rows: int, dtype: torch.dtype, indices: int
) -> None:
    for value in (1.0, float("nan"), float("inf")):
        alone, mine = alone_and_joined(sparse, rows, dtype, indices, value)
        assert_equal(mine, alone)


def alone_and_joined(
    op: Callable[..., Tensor], rows: int, dtype: torch.dtype, indices: int, value: float
) -> tuple[Results, Results]:
    """The results of a segment by itself, and its share of those of a batch where others hold multiples of `value`."""
    inputs, index, upstream = tensors(rows, 11, dtype, indices)
    alone = run(op, inputs, index, Segments((Segment(0, rows, 0, 11, 0.3),)), upstream=upstream)
    items = (Segment(0, 3, 0, 5), Segment(3, 3 + rows, 5, 16, 0.3), Segment(3 + rows, 5 + rows, 16, 18))
    joined, among, gradient = tensors(rows + 5, 18, dtype, indices, seed=1)
    for tensor in (*joined.values(), gradient):
        tensor *= value
    batch, stack = slice(3, 3 + rows), slice(5, 16)
    for name, tensor in inputs.items():
        joined[name][stack if name == "v" else batch] = tensor
    among.places[stack], gradient[batch] = index.places, upstream
    results = run(op, joined, among, Segments(items), upstream=gradient)
    return alone, {name: t[stack if name == "d.v" else batch] for name, t in results.items()}


def tensors(
    rows: int, count: int, dtype: torch.dtype, indices: int, seed: int = 0
) -> tuple[dict[str, Tensor], SparseIndex, Tensor]:
    """(x, y, v by name; the places of v, some of them twice; an upstream gradient); v is float32 or wider."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    v = normal(count, 1 if indices == 2 else D_IN, wide)
    inputs = {"x": normal(rows, D_IN, dtype), "y": normal(rows, D_OUT, dtype), "v": v}
    columns = [torch.randint(0, width, (count,), generator=generator) for width in (D_OUT, D_IN)[:indices]]
    return inputs, SparseIndex(torch.stack(columns, dim=1)), normal(rows, D_OUT, dtype)
