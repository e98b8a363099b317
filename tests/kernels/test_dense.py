"""The dense op, where it can be built: equal to its reference, and every row a function of its own segments alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.compiled.build import LIMIT, build
from polygraft.kernels.dense import library, op, reference
from polygraft.kernels.dense.op import ACTIVATIONS, FusedBranch, Weights, Work, supports
from tests.compiled import HERE, compiled
from tests.kernels.compare import relative

WIDTHS = (48, 33)  # a panel and a half, and one column more than a panel
ROUNDED = 1e-2  # rel-L2 of bf16 results and hidden values to float64


@cache
def built(limit: str) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LIMIT, limit)
        return library.load(build(library.SOURCE))


@pytest.fixture(autouse=True, params=["ALL", "AVX512_CORE_BF16"] if HERE else ["ALL"])
def _instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that this CPU has, and without tiles."""
    if HERE:
        monkeypatch.setattr(op, "library", lambda: built(request.param))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def weights(inner: int, widths: tuple[int, ...] = WIDTHS) -> list[Tensor]:
    return [normal(width, inner, seed=i) / inner**0.5 for i, width in enumerate(widths)]


def sides(inner: int, items: tuple[Segment, ...], act: str = "identity", widths: tuple[int, ...] = WIDTHS) -> Work:
    """A branch of those segments beside every projection."""
    ranks = max((s.last for s in items), default=1)
    return [
        (
            FusedBranch(i, normal(ranks, inner, seed=i + 5) / inner**0.5, normal(ranks, width, seed=i + 9), act),
            Segments(items),
        )
        for i, width in enumerate(widths)
    ]


def of_ranks(beside: Work, ranks: slice, segments: Segments) -> Work:
    """The branches of some ranks by themselves."""
    return [(replace(side, A=side.A[ranks].clone(), B=side.B[ranks].clone()), segments) for side, _ in beside]


def linear(x: Tensor, weights: Weights, beside: Work = ()) -> Tensor:
    return op.linear(x, weights, beside)[0]


MIXED = (
    Segment(0, 1, 0, 5, 0.7),
    Segment(1, 30, 5, 6),
    Segment(30, 67, 6, 56, 1.3),
    Segment(40, 70, 56, 60, -2.0),
    Segment(69, 69, 0, 5),
    Segment(66, 68, 3, 3),
)


@compiled
@pytest.mark.parametrize("inner", [32, 64, 352, 1536])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 70, 129, 300])
def test_products_equal_the_reference(rows: int, inner: int) -> None:
    x, W = normal(rows, inner, seed=1), weights(inner)
    assert relative(linear(x, Weights.packed(W)), reference.linear(x.double(), W)) < ROUNDED


@compiled
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("inner", [32, 352])
def test_branches_of_mixed_ranks_beside_products_equal_the_reference(inner: int, act: str) -> None:
    x, W, beside = normal(70, inner, seed=1), weights(inner), sides(inner, MIXED, act)
    found, bare = linear(x, Weights.packed(W), beside), linear(x, Weights.packed(W))
    assert relative(found, reference.linear(x.double(), W, beside)) < ROUNDED
    assert relative(bare, found) > 0.1, "the branches must matter"


@compiled
@pytest.mark.parametrize("rows", [16, 70, 100, 400])
def test_a_row_is_the_same_bits_alone_and_in_company(rows: int) -> None:
    inner = 352
    packed, own = Weights.packed(weights(inner)), 7
    x = normal(rows + own, inner, seed=1)
    for start in (0, 5, rows):
        items = (Segment(0, start, 0, 8), Segment(start, start + own, 8, 50, 0.3), Segment(start + own, rows, 50, 64))
        beside = sides(inner, items)
        alone = of_ranks(beside, slice(8, 50), Segments((Segment(0, own, 0, 42, 0.3),)))
        together = linear(x, packed, beside)[start : start + own]
        assert torch.equal(together, linear(x[start : start + own].clone(), packed, alone))


@compiled
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("poisoned", ["x", "A", "B"])
def test_what_is_not_finite_stays_in_the_rows_of_its_graft(poisoned: str, value: float) -> None:
    inner, mine = 64, slice(3, 10)
    items = (Segment(0, 3, 0, 4), Segment(3, 10, 4, 8), Segment(10, 20, 8, 40))
    x, packed, beside = normal(20, inner, seed=1), Weights.packed(weights(inner)), sides(inner, items)
    clean = linear(x, packed, beside)
    for side, _ in beside:
        for name, rows in (("A", side.A), ("B", side.B)):
            if name == poisoned:
                rows[:4], rows[8:] = value, value
    if poisoned == "x":
        x[:3], x[10:] = value, value
    found = linear(x, packed, beside)
    assert torch.equal(found[mine], clean[mine])
    assert not found[10:].isfinite().all()


@compiled
def test_finite_columns_of_a_graft_that_is_not_finite_are_as_good() -> None:
    inner = 64
    items = (Segment(0, 3, 0, 4), Segment(3, 20, 4, 40))
    x, W, beside = normal(20, inner, seed=1), weights(inner), sides(inner, items)
    beside[0][0].B[5, 7] = float("inf")
    found, wanted = linear(x, Weights.packed(W), beside), reference.linear(x.double(), W, beside)
    kept = wanted.isfinite()
    assert not found[~kept].isfinite().any() and relative(found[kept], wanted[kept]) < ROUNDED


@compiled
@settings(max_examples=30)
@given(st.data())
def test_any_segments_equal_the_reference(data: st.DataObject) -> None:
    rows, ranks, inner = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 70)), 64
    bound = st.tuples(st.integers(0, rows), st.integers(0, rows), st.integers(0, ranks), st.integers(0, ranks))
    pairs = ((sorted((a, b)), sorted((c, d))) for a, b, c, d in data.draw(st.lists(bound, max_size=5)))
    items = tuple(Segment(start, stop, first, last, 0.5) for (start, stop), (first, last) in pairs)
    x, W = normal(rows, inner, seed=1), weights(inner)
    beside = [
        (replace(side, A=normal(ranks, inner, seed=3), B=normal(ranks, WIDTHS[side.member], seed=4)), segments)
        for side, segments in sides(inner, items)
    ]
    assert relative(linear(x, Weights.packed(W), beside), reference.linear(x.double(), W, beside)) < ROUNDED


@compiled
@pytest.mark.parametrize("rows", [70, 300])
def test_one_thread_and_two_give_the_same_bits(rows: int) -> None:
    x, packed, beside = normal(rows, 1536, seed=1), Weights.packed(weights(1536)), sides(1536, MIXED)
    found, threads = linear(x, packed, beside), torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        assert torch.equal(linear(x, packed, beside), found)
    finally:
        torch.set_num_threads(threads)


@compiled
def test_rows_may_be_columns_of_a_wider_tensor() -> None:
    wide = normal(20, 160, seed=1)
    packed = Weights.packed(weights(64))
    assert torch.equal(linear(wide[:, 32:96], packed), linear(wide[:, 32:96].contiguous(), packed))


@compiled
@pytest.mark.parametrize("beyond", [Segment(0, 21, 0, 4), Segment(0, 20, 0, 5)], ids=["rows", "ranks"])
def test_segments_beyond_the_rows_or_the_ranks_are_refused(beyond: Segment) -> None:
    beside = [(side, Segments((beyond,))) for side, _ in sides(64, (Segment(0, 20, 0, 4),))]
    with pytest.raises(
        IndexError, match=f"segments of {beyond.stop} rows and {beyond.last} ranks for 20 rows and 4 ranks"
    ):
        linear(normal(20, 64, seed=1), Weights.packed(weights(64)), beside)


@compiled
def test_packed_weights_come_back_as_they_were() -> None:
    W = weights(96)
    assert torch.equal(Weights.packed(W).dense(), torch.cat(W))


def test_other_dtypes_and_inner_widths_are_not_for_it() -> None:
    assert not supports(torch.zeros(32, 64)) and not supports(torch.zeros(32, 65).bfloat16())
    assert not supports(torch.zeros(33, 64).bfloat16())
    assert supports(torch.zeros(32, 64).bfloat16()) == HERE


# Widths that the gradients' products have as terms; segments that lie across blocks of 16 rows and tiles of terms.
EVEN = (64, 96)
RUNS = (Segment(0, 5, 0, 5, 0.7), Segment(5, 50, 5, 25, -1.5), Segment(50, 90, 25, 27))


def even_sides(inner: int, act: str, items: tuple[Segment, ...] = RUNS) -> Work:
    return sides(inner, items, act, EVEN)


def gradients(x: Tensor, dy: Tensor, W: Sequence[Tensor], beside: Work) -> list[Tensor]:
    """dx, then dA and dB of every side, by the op."""
    weights = Weights.plain(torch.cat(list(W)), [len(w) for w in W])
    _, kept = op.linear(x, weights, beside, keep=True)
    dx, dh = op.transposed(dy, weights, beside, kept)
    columns, found = dy.split_with_sizes([len(w) for w in W], dim=1), [dx]
    for (side, segments), up, slope in zip(beside, kept, dh, strict=True):
        of_A, of_B = (slope, x, segments, len(side.A)), (up, columns[side.member], segments, len(side.B))
        found += op.outers([op.Outer(*of_A), op.Outer(*of_B)])
    return found


def true_gradients(x: Tensor, dy: Tensor, W: Sequence[Tensor], beside: Work) -> list[Tensor]:
    """The same by autograd over the reference, in float64."""
    leaves = [x.double().requires_grad_()]
    wide = []
    for side, segments in beside:
        A, B = side.A.double().requires_grad_(), side.B.double().requires_grad_()
        leaves += [A, B]
        wide.append((replace(side, A=A, B=B), segments))
    reference.linear(leaves[0], [w.double() for w in W], wide).backward(dy.double())
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def assert_gradients(x: Tensor, dy: Tensor, W: Sequence[Tensor], beside: Work) -> None:
    for found, wanted in zip(gradients(x, dy, W, beside), true_gradients(x, dy, W, beside), strict=True):
        assert relative(found, wanted) < ROUNDED


@compiled
@pytest.mark.parametrize("inner", [32, 352])
def test_plain_weights_and_packed_ones_give_the_same_bits(inner: int) -> None:
    x, W, beside = normal(90, inner, seed=1), weights(inner, EVEN), even_sides(inner, "relu")
    plain = Weights.plain(torch.cat(W), EVEN)
    assert torch.equal(linear(x, plain, beside), linear(x, Weights.packed(W), beside))


@compiled
@pytest.mark.parametrize("act", op.MASK_DERIVATIVE)
@pytest.mark.parametrize("inner", [32, 352])
def test_gradients_equal_the_references(inner: int, act: str) -> None:
    W, beside = weights(inner, EVEN), even_sides(inner, act)
    x, dy = normal(90, inner, seed=1), normal(90, sum(EVEN), seed=2)
    assert_gradients(x, dy, W, beside)


@compiled
def test_a_relu_of_a_negative_factor_has_no_slope_where_it_is_zero() -> None:
    x, W, items = normal(40, 32, seed=1), weights(32, EVEN), (Segment(0, 40, 0, 16, -1.0),)
    beside, dy = even_sides(32, "relu", items), normal(40, sum(EVEN), seed=2)
    assert_gradients(x, dy, W, beside)


@compiled
def test_gradients_of_segments_that_share_ranks_are_added() -> None:
    items = (Segment(0, 20, 0, 8), Segment(20, 53, 8, 20, 0.5), Segment(53, 90, 0, 8, 2.0))
    x, W, beside = normal(90, 64, seed=1), weights(64, EVEN), even_sides(64, "identity", items)
    dy = normal(90, sum(EVEN), seed=2)
    assert_gradients(x, dy, W, beside)


@compiled
@pytest.mark.parametrize("start", [0, 5, 50])
def test_a_segments_gradients_are_the_same_bits_alone_and_in_company(start: int) -> None:
    inner, own, ranks = 352, 37, 20
    x, dy, W = normal(90, inner, seed=1), normal(90, sum(EVEN), seed=2), weights(inner, EVEN)
    items = (Segment(0, start, 0, 8), Segment(start, start + own, 8, 8 + ranks, 0.3), Segment(start + own, 90, 28, 32))
    beside = even_sides(inner, "relu", items)
    dx, *rest = gradients(x, dy, W, beside)
    mine = slice(start, start + own)
    alone = of_ranks(beside, slice(8, 28), Segments((Segment(0, own, 0, ranks, 0.3),)))
    dx_alone, *rest_alone = gradients(x[mine].clone(), dy[mine].clone(), W, alone)
    assert torch.equal(dx[mine], dx_alone)
    for found, wanted in zip(rest, rest_alone, strict=True):
        assert torch.equal(found[8:28], wanted)


@compiled
@pytest.mark.parametrize("poisoned", ["x", "dy", "A", "B"])
def test_gradients_of_other_grafts_are_untouched_by_what_is_not_finite(poisoned: str) -> None:
    x, dy, W = normal(90, 64, seed=1), normal(90, sum(EVEN), seed=2), weights(64, EVEN)
    beside = even_sides(64, "relu")
    clean = gradients(x, dy, W, beside)
    for side, _ in beside:
        if poisoned in ("A", "B"):
            tensor = side.A if poisoned == "A" else side.B
            tensor[:5], tensor[25:] = float("nan"), float("inf")
    if poisoned in ("x", "dy"):
        tensor = x if poisoned == "x" else dy
        tensor[:5], tensor[50:] = float("nan"), float("inf")
    dx, *rest = gradients(x, dy, W, beside)
    assert torch.equal(dx[5:50], clean[0][5:50])
    for found, wanted in zip(rest, clean[1:], strict=True):
        assert torch.equal(found[5:25], wanted[5:25])
