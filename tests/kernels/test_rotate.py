"""The rotate op: equal to its reference in every kind, and every segment a function of itself alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.rotate import reference
from polygraft.kernels.rotate.op import rotate
from polygraft.kernels.rotate.order import butterfly
from polygraft.kernels.rotate.rotation import Rotation
from tests.kernels.compare import TOLERANCE, Results, assert_as_good_as_steps, assert_close, assert_equal, run

WIDTH = 48
# name -> (rotation; operands by name: columns; stack rows of a graft)
KINDS = {
    "blocks.8.1": (Rotation("blocks", 8), {"D": 8}, WIDTH),
    "blocks.3.1": (Rotation("blocks", 3), {"D": 3}, WIDTH),
    "blocks.4.3": (Rotation("blocks", 4, 3), {"D": 4}, 3 * WIDTH),
    "blocks.48.1": (Rotation("blocks", 48), {"D": 48}, WIDTH),
    "lowrank": (Rotation("lowrank"), {"A": WIDTH, "B": WIDTH}, 4),
    "pairs.16": (Rotation("pairs", 16), {"c": WIDTH, "s": WIDTH}, 1),
    "pairs.2": (Rotation("pairs", 2), {"c": WIDTH, "s": WIDTH}, 1),
}
# (rows, grafts, (start, stop, graft))
CASES = {
    "one row": (1, 1, ((0, 1, 0),)),
    "63 rows": (63, 2, ((0, 63, 1),)),
    "uncovered rows and grafts": (65, 4, ((1, 2, 2), (7, 64, 0))),
    "empty segments": (8, 3, ((0, 0, 0), (0, 8, 1), (8, 8, 2))),
    "one graft twice": (9, 2, ((0, 4, 1), (4, 9, 1))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_equal_the_reference(
    case: tuple[int, int, tuple[tuple[int, int, int], ...]], dtype: torch.dtype, kind: str
) -> None:
    rows, grafts, items = case
    inputs, upstream = tensors(rows, grafts, dtype, kind)
    segments = Segments(tuple(segment(kind, *item) for item in items))
    got = run(named(rotate, kind), inputs, segments, upstream=upstream)
    assert_close(got, run(named(reference.rotate, kind), inputs, segments, upstream=upstream), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_good_as_the_obvious_steps(kind: str) -> None:
    inputs, upstream = tensors(33, 1, torch.bfloat16, kind)
    segments = Segments((segment(kind, 0, 33, 0),))
    got = run(named(rotate, kind), inputs, segments, upstream=upstream)
    want = run(named(reference.rotate, kind), inputs, segments, upstream=upstream)
    truth = run(named(reference.rotate, kind), inputs, segments, upstream=upstream, dtype=torch.float64)
    assert got["out"].dtype == torch.bfloat16
    assert_as_good_as_steps(got, want, truth)


def test_a_butterfly_brings_channels_together_that_the_stage_before_kept_apart() -> None:
    assert butterfly(8, 2, 0).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert butterfly(8, 2, 1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert butterfly(8, 2, 2).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_without_segments_the_rows_pass_as_they_are() -> None:
    x = torch.randn(3, WIDTH)
    assert rotate(x, {"D": torch.ones(WIDTH, 4)}, Rotation("blocks", 4), Segments(())) is x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 65])
def test_a_segments_bits_do_not_change_when_others_join_whatever_they_hold(
    rows: int, dtype: torch.dtype, kind: str
) -> None:
    for value in (1.0, float("nan"), float("inf")):
        alone, mine = alone_and_joined(rotate, rows, dtype, kind, value)
        assert_equal(mine, alone)


def alone_and_joined(op: object, rows: int, dtype: torch.dtype, kind: str, value: float) -> tuple[Results, Results]:
    """The results of a segment by itself, and its share of those of a batch where others hold multiples of `value`."""
    inputs, upstream = tensors(rows, 1, dtype, kind)
    alone = run(named(op, kind), inputs, Segments((segment(kind, 0, rows, 0),)), upstream=upstream)
    size = KINDS[kind][2]
    items = (segment(kind, 0, 3, 0), segment(kind, 3, 3 + rows, 1), segment(kind, 3 + rows, 5 + rows, 2))
    joined, gradient = tensors(rows + 5, 3, dtype, kind, seed=1)
    for tensor in (*joined.values(), gradient):
        tensor *= value
    batch, stack = slice(3, 3 + rows), slice(size, 2 * size)
    for name, tensor in inputs.items():
        joined[name][batch if name == "x" else stack] = tensor
    gradient[batch] = upstream
    results = run(named(op, kind), joined, Segments(items), upstream=gradient)
    return alone, {name: t[batch if name in ("out", "d.x") else stack] for name, t in results.items()}


def named(op: object, kind: str) -> partial[Tensor]:
    """The op as a function of x, its operands one by one, and segments."""

    def called(x: Tensor, *rest: Tensor | Segments) -> Tensor:
        *operands, segments = rest
        return op(x, dict(zip(KINDS[kind][1], operands, strict=True)), KINDS[kind][0], segments)  # type: ignore[operator]

    return partial(called)


def segment(kind: str, start: int, stop: int, graft: int) -> Segment:
    size = KINDS[kind][2]
    return Segment(start, stop, size * graft, size * (graft + 1))


def tensors(rows: int, grafts: int, dtype: torch.dtype, kind: str, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """(x and the operands by name, an upstream gradient); operands are float32 or wider, as in the stacks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)

    x, upstream, wide = (
        normal(rows, WIDTH, dtype),
        normal(rows, WIDTH, dtype),
        torch.promote_types(dtype, torch.float32),
    )
    _, columns, size = KINDS[kind]
    return {"x": x, **{name: 0.2 * normal(size * grafts, width, wide) for name, width in columns.items()}}, upstream
