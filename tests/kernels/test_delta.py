"""The delta op: equal to its reference, and every segment a function of itself alone."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.delta import reference
from polygraft.kernels.delta.op import Generate, delta
from tests.kernels.compare import TOLERANCE, assert_as_good_as_steps, assert_close, assert_equal, run

D_IN, D_OUT = 33, 47
# Numbers of a graft by its first row: rank-one, low-rank and full generators.
SIZES = {0: D_IN + D_OUT, 80: 3 * (D_IN + D_OUT), 320: D_IN * D_OUT}
LAST = {first: first + size for first, size in SIZES.items()}
CASES = {
    "one row": (1, (Segment(0, 1, 0, LAST[0], 0.5),)),
    "three generators": (
        70,
        (Segment(0, 1, 0, LAST[0]), Segment(1, 60, 80, LAST[80], 0.3), Segment(60, 70, 320, LAST[320])),
    ),
    "empty segment and uncovered rows": (20, (Segment(0, 0, 0, LAST[0]), Segment(3, 17, 320, LAST[320], 2.0))),
    "overlapping rows": (20, (Segment(0, 12, 0, LAST[0]), Segment(5, 20, 80, LAST[80], 0.3))),
    "one generator twice": (20, (Segment(0, 7, 80, LAST[80]), Segment(7, 20, 80, LAST[80], 0.3))),
    "nothing": (4, ()),
}


def product(t: Tensor) -> Tensor:
    """B tanh(A) of the numbers of A and B."""
    A, B = t.view(-1).split_with_sizes([len(t) * D_IN // (D_IN + D_OUT), len(t) * D_OUT // (D_IN + D_OUT)])
    return B.view(D_OUT, -1) @ A.view(-1, D_IN).tanh()


GENERATORS: Mapping[int, Generate] = {0: product, 80: product, 320: lambda t: t.view(D_OUT, D_IN).sin()}


def tensors(rows: int, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (rows, D_IN), "y": (rows, D_OUT), "t": (LAST[320], 1)}
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    drawn["t"] /= D_IN**0.5
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {name: tensor.to(wide if name == "t" else dtype) for name, tensor in drawn.items()}
    return inputs, torch.randn(rows, D_OUT, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_equal_the_reference(case: tuple[int, tuple[Segment, ...]], dtype: torch.dtype) -> None:
    rows, items = case
    inputs, upstream = tensors(rows, dtype)
    got = run(delta, inputs, Segments(items), GENERATORS, upstream=upstream)
    want = run(reference.delta, inputs, Segments(items), GENERATORS, upstream=upstream)
    assert_close({name: got.get(name, torch.zeros_like(value)) for name, value in want.items()}, want, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["one row", "three generators"])
def test_bf16_is_as_good_as_its_obvious_steps(name: str) -> None:
    rows, items = CASES[name]
    inputs, upstream = tensors(rows, torch.bfloat16)

    def steps(x: Tensor, y: Tensor, t: Tensor, segments: Segments, generate: Mapping[int, Generate]) -> Tensor:
        out = list(y.unbind())
        for s in segments:
            added = x[s.start : s.stop] @ (s.scale * generate[s.first](t[s.first : s.last]).to(x.dtype)).T
            out[s.start : s.stop] = (torch.stack(out[s.start : s.stop]) + added).unbind()
        return torch.stack(out)

    got = run(delta, inputs, Segments(items), GENERATORS, upstream=upstream)
    by_steps = run(steps, inputs, Segments(items), GENERATORS, upstream=upstream)
    truth = run(reference.delta, inputs, Segments(items), GENERATORS, upstream=upstream, dtype=torch.float64)
    assert_as_good_as_steps(got, by_steps, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("others", [1.0, float("nan")], ids=["other rows", "rows of NaN"])
def test_a_segment_has_the_same_bits_wherever_it_lies(dtype: torch.dtype, others: float) -> None:
    """Alone, and after foreign rows and numbers that shift it in memory, finite or not."""
    own, upstream = tensors(11, dtype)
    alone = run(delta, own, Segments((Segment(0, 11, 80, LAST[80], 0.7),)), GENERATORS, upstream=upstream)
    moved = {name: torch.cat((torch.full_like(tensor[:5], others), tensor)) for name, tensor in own.items()}
    first, last = 85, LAST[80] + 5
    items = (Segment(0, 5, 0, LAST[0]), Segment(5, 16, first, last, 0.7))
    slopes = torch.cat((torch.full_like(upstream[:5], others), upstream))
    got = run(delta, moved, Segments(items), {0: product, first: product}, upstream=slopes)
    assert_equal(
        {name: tensor[first:last] if name == "d.t" else tensor[5:] for name, tensor in got.items()},
        {name: tensor[80 : LAST[80]] if name == "d.t" else tensor for name, tensor in alone.items()},
    )


def test_the_inputs_are_left_as_they_were() -> None:
    inputs, upstream = tensors(70, torch.float32)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    run(delta, inputs, Segments(CASES["three generators"][1]), GENERATORS, upstream=upstream)
    assert_equal(inputs, before)
