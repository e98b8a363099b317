"""The dense op, where it can be built: equal to its reference, and every row a function of its own segments alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.dense import library, reference
from polygraft.kernels.dense.op import ACTIVATIONS, Packed, Side, linear, supports

WIDTHS = (48, 33)  # a panel and a half, and one column more than a panel
ROUNDED = 1e-2  # rel-L2 of bf16 results and hidden values to float64

try:
    library.build()
    HERE = library.library() is not None
except library.Unavailable:
    HERE = False
here = pytest.mark.skipif(not HERE, reason="no AMX or no compiler on this machine")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def weights(inner: int, widths: tuple[int, ...] = WIDTHS) -> list[Tensor]:
    return [normal(width, inner, seed=i) / inner**0.5 for i, width in enumerate(widths)]


def sides(inner: int, items: tuple[Segment, ...], act: str = "identity") -> list[Side]:
    """A branch of those segments beside every projection."""
    ranks = max((s.last for s in items), default=1)
    return [
        Side(i, normal(ranks, inner, seed=i + 5) / inner**0.5, normal(ranks, width, seed=i + 9), Segments(items), act)
        for i, width in enumerate(WIDTHS)
    ]


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


MIXED = (
    Segment(0, 1, 0, 5, 0.7),
    Segment(1, 30, 5, 6),
    Segment(30, 67, 6, 56, 1.3),
    Segment(40, 70, 56, 60, -2.0),
    Segment(69, 69, 0, 5),
    Segment(66, 68, 3, 3),
)


@here
@pytest.mark.parametrize("inner", [32, 64, 352, 1536])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 70, 129])
def test_products_equal_the_reference(rows: int, inner: int) -> None:
    x, W = normal(rows, inner, seed=1), weights(inner)
    assert apart(linear(x, Packed.of(W)), reference.linear(x.double(), W)) < ROUNDED


@here
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("inner", [32, 352])
def test_branches_of_mixed_ranks_beside_products_equal_the_reference(inner: int, act: str) -> None:
    x, W, beside = normal(70, inner, seed=1), weights(inner), sides(inner, MIXED, act)
    found, bare = linear(x, Packed.of(W), beside), linear(x, Packed.of(W))
    assert apart(found, reference.linear(x.double(), W, beside)) < ROUNDED
    assert apart(bare, found) > 0.1, "the branches must matter"


@here
@pytest.mark.parametrize("rows", [16, 70, 100])
def test_a_row_is_the_same_bits_alone_and_in_company(rows: int) -> None:
    inner = 352
    packed, own = Packed.of(weights(inner)), 7
    x = normal(rows + own, inner, seed=1)
    for start in (0, 5, rows):
        items = (Segment(0, start, 0, 8), Segment(start, start + own, 8, 50, 0.3), Segment(start + own, rows, 50, 64))
        beside = sides(inner, items)
        alone = [
            side._replace(
                A=side.A[8:50].clone(), B=side.B[8:50].clone(), segments=Segments((Segment(0, own, 0, 42, 0.3),))
            )
            for side in beside
        ]
        together = linear(x, packed, beside)[start : start + own]
        assert torch.equal(together, linear(x[start : start + own].clone(), packed, alone))


@here
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("poisoned", ["x", "A", "B"])
def test_what_is_not_finite_stays_in_the_rows_of_its_graft(poisoned: str, value: float) -> None:
    inner, mine = 64, slice(3, 10)
    items = (Segment(0, 3, 0, 4), Segment(3, 10, 4, 8), Segment(10, 20, 8, 40))
    x, packed, beside = normal(20, inner, seed=1), Packed.of(weights(inner)), sides(inner, items)
    clean = linear(x, packed, beside)
    for side in beside:
        for name, rows in (("A", side.A), ("B", side.B)):
            if name == poisoned:
                rows[:4], rows[8:] = value, value
    if poisoned == "x":
        x[:3], x[10:] = value, value
    found = linear(x, packed, beside)
    assert torch.equal(found[mine], clean[mine])
    assert not found[10:].isfinite().all()


@here
def test_finite_columns_of_a_graft_that_is_not_finite_are_as_good() -> None:
    inner = 64
    items = (Segment(0, 3, 0, 4), Segment(3, 20, 4, 40))
    x, W, beside = normal(20, inner, seed=1), weights(inner), sides(inner, items)
    beside[0].B[5, 7] = float("inf")
    found, wanted = linear(x, Packed.of(W), beside), reference.linear(x.double(), W, beside)
    kept = wanted.isfinite()
    assert not found[~kept].isfinite().any() and apart(found[kept], wanted[kept]) < ROUNDED


@here
@settings(max_examples=30)
@given(st.data())
def test_any_segments_equal_the_reference(data: st.DataObject) -> None:
    rows, ranks, inner = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 70)), 64
    bound = st.tuples(st.integers(0, rows), st.integers(0, rows), st.integers(0, ranks), st.integers(0, ranks))
    items = tuple(
        Segment(*sorted((a, b)), *sorted((c, d)), scale=0.5) for a, b, c, d in data.draw(st.lists(bound, max_size=5))
    )
    x, W = normal(rows, inner, seed=1), weights(inner)
    beside = [
        side._replace(A=normal(ranks, inner, seed=3), B=normal(ranks, WIDTHS[side.member], seed=4))
        for side in sides(inner, items)
    ]
    assert apart(linear(x, Packed.of(W), beside), reference.linear(x.double(), W, beside)) < ROUNDED


@here
def test_one_thread_and_two_give_the_same_bits() -> None:
    x, packed, beside = normal(100, 1536, seed=1), Packed.of(weights(1536)), sides(1536, MIXED)
    found, threads = linear(x, packed, beside), torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        assert torch.equal(linear(x, packed, beside), found)
    finally:
        torch.set_num_threads(threads)


@here
def test_rows_may_be_columns_of_a_wider_tensor() -> None:
    wide = normal(20, 160, seed=1)
    packed = Packed.of(weights(64))
    assert torch.equal(linear(wide[:, 32:96], packed), linear(wide[:, 32:96].contiguous(), packed))


@here
def test_packed_weights_come_back_as_they_were() -> None:
    W = weights(96)
    assert torch.equal(Packed.of(W).dense(), torch.cat(W))


def test_other_dtypes_and_inner_widths_are_not_for_it() -> None:
    assert not supports(torch.zeros(32, 64)) and not supports(torch.zeros(32, 65).bfloat16())
    assert supports(torch.zeros(31, 64).bfloat16()) == HERE
