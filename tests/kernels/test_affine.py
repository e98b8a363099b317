"""The affine op: equal to its reference in both of its forms, and every segment a function of itself alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polygraft.kernels.affine import reference
from polygraft.kernels.affine.op import affine
from polygraft.kernels.common.segments import Segment, Segments
from tests.kernels.compare import TOLERANCE, Results, assert_as_good_as_steps, assert_close, assert_equal, run

# (rows, vectors, segments); the op gathers its vectors from five segments on
CASES = {
    "one row": (1, 1, (Segment(0, 1, 0, 1),)),
    "63 rows": (63, 2, (Segment(0, 63, 1, 2),)),
    "uncovered rows and vectors": (65, 4, (Segment(1, 2, 2, 3), Segment(7, 64, 0, 1))),
    "empty segments": (8, 3, (Segment(0, 0, 0, 1), Segment(0, 8, 1, 2), Segment(8, 8, 2, 3))),
    "one vector twice": (9, 2, (Segment(0, 4, 1, 2), Segment(4, 9, 1, 2))),
    "gathered": (65, 7, tuple(Segment(9 * i, 9 * i + 9, 6 - i, 7 - i) for i in range(7))),
    "gathered, uncovered rows": (65, 6, tuple(Segment(11 * i + 2, 11 * i + 5, i, i + 1) for i in range(6))),
}
PARTS = {"scale and shift": "gb", "scale": "g", "shift": "b"}
WIDTH = 33


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_equal_the_reference(
    case: tuple[int, int, tuple[Segment, ...]], dtype: torch.dtype, parts: str
) -> None:
    rows, vectors, items = case
    inputs, upstream = tensors(rows, vectors, dtype, parts)
    got = run(affine, inputs, Segments(items), upstream=upstream)
    assert_close(got, run(reference.affine, inputs, Segments(items), upstream=upstream), TOLERANCE[dtype])


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bf16_rows_are_rounded_once(case: tuple[int, int, tuple[Segment, ...]], parts: str) -> None:
    rows, vectors, items = case
    inputs, upstream = tensors(rows, vectors, torch.bfloat16, parts)
    got = run(affine, inputs, Segments(items), upstream=upstream)
    want = run(reference.affine, inputs, Segments(items), upstream=upstream)
    assert_equal({"out": got["out"]}, {"out": want["out"]})
    truth = run(reference.affine, inputs, Segments(items), upstream=upstream, dtype=torch.float64)
    assert_as_good_as_steps(got, want, truth)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_without_gradients_the_output_is_the_same(case: tuple[int, int, tuple[Segment, ...]], parts: str) -> None:
    rows, vectors, items = case
    inputs, upstream = tensors(rows, vectors, torch.bfloat16, parts)
    assert torch.equal(
        affine(inputs["y"], inputs["g"], inputs["b"], Segments(items)),  # type: ignore[arg-type]
        run(affine, inputs, Segments(items), upstream=upstream)["out"],
    )


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)), max_size=8))
def test_any_segments_equal_the_reference(gaps_rows_and_vectors: list[tuple[int, int, int]]) -> None:
    items, end = [], 0
    for gap, rows, vector in gaps_rows_and_vectors:
        items.append(Segment(end + gap, end + gap + rows, vector, vector + 1))
        end += gap + rows
    inputs, upstream = tensors(end + 1, 5, torch.float64, "gb")
    got = run(affine, inputs, Segments(tuple(items)), upstream=upstream)
    want = run(reference.affine, inputs, Segments(tuple(items)), upstream=upstream)
    want = {name: want.get(name, torch.zeros_like(got[name])) for name in got}
    assert_close(got, want, TOLERANCE[torch.float64])


def test_without_segments_the_rows_pass_as_they_are() -> None:
    y = torch.randn(3, 5)
    assert affine(y, torch.ones(1, 5), None, Segments(())) is y


@pytest.mark.parametrize("others", [1, 6], ids=["each alone", "gathered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 65])
def test_a_segments_bits_do_not_change_when_others_join_whatever_they_hold(
    rows: int, dtype: torch.dtype, others: int
) -> None:
    inputs, upstream = tensors(rows, 1, dtype, "gb")
    alone = run(affine, inputs, Segments((Segment(0, rows, 0, 1),)), upstream=upstream)
    for value in (1.0, float("nan"), float("inf")):
        before = tuple(Segment(3 * i, 3 * i + 3, i, i + 1) for i in range(others))
        start = 3 * others
        after = Segment(start + rows, start + rows + 2, others + 1, others + 2)
        items = (*before, Segment(start, start + rows, others, others + 1), after)
        joined, gradient = tensors(start + rows + 4, others + 2, dtype, "gb", seed=1)
        for tensor in (*joined.values(), gradient):
            assert tensor is not None
            tensor *= value
        batch, stack = slice(start, start + rows), slice(others, others + 1)
        for name, tensor in inputs.items():
            place = joined[name]
            assert place is not None and tensor is not None
            place[batch if name == "y" else stack] = tensor
        gradient[batch] = upstream
        results = run(affine, joined, Segments(items), upstream=gradient)
        mine: Results = {n: t[stack if n in ("d.g", "d.b") else batch] for n, t in results.items()}
        assert_equal(mine, alone)


def tensors(
    rows: int, vectors: int, dtype: torch.dtype, parts: str, seed: int = 0
) -> tuple[dict[str, Tensor | None], Tensor]:
    """(y, g, b by name, an upstream gradient); the vectors are float32 or wider, as in the stacks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)

    y, upstream = normal(rows, dtype), normal(rows, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    given: dict[str, Tensor | None] = {part: normal(vectors, wide) if part in parts else None for part in "gb"}
    return {"y": y, **given}, upstream
