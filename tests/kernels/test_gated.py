"""The gated branch on CPU: equal to its reference, and every segment a function of itself alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polygraft.kernels.branch import reference
from polygraft.kernels.branch.gated import gated
from polygraft.kernels.common.gate import Gate
from polygraft.kernels.common.segments import Segment, Segments
from tests.kernels.cases import CASES, Case, branch_inputs
from tests.kernels.compare import TOLERANCE, Results, assert_close, assert_equal, run

GATES = (Gate("sigmoid"), Gate("softmax"), Gate("softmax", 2))
ATTENTION = Gate("attention", experts=3)
DTYPES = (torch.float64, torch.float32)


def experts(case: Case) -> tuple[Segments, int]:
    """Gates of the case's segments, as many as share a segment's ranks, one after the other."""
    items: list[Segment] = []
    first = 0
    for s in case.segments:
        count = next((n for n in (3, 2, 1) if s.size and s.size % n == 0), 0)
        items.append(Segment(s.start, s.stop, first, first + count))
        first += count
    return Segments(tuple(items)), first


def inputs_of(case: Case, rows: int, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    inputs, upstream = branch_inputs(case, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 7)
    inputs["G"] = (torch.randn(rows, case.d_in, generator=generator, dtype=torch.float64) / 4).to(dtype)
    return inputs, upstream


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_equal_the_reference(case: Case, dtype: torch.dtype, gate: Gate) -> None:
    gates, rows = experts(case)
    inputs, upstream = inputs_of(case, rows, dtype)
    kept = Segments(tuple(s for s in case.segments if s.rows and s.size))
    scored = Segments(tuple(g for s, g in zip(case.segments, gates, strict=True) if s.rows and s.size))
    got = run(gated, inputs, case.segments, gates, "silu", gate, upstream=upstream)
    want = run(reference.gated, inputs, kept, scored, "silu", gate, upstream=upstream)
    want = {name: want.get(name, torch.zeros_like(got[name])) for name in got}
    assert_close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_to_experts_equals_the_reference(dtype: torch.dtype) -> None:
    segments = (Segment(0, 5, 0, 12, 0.5), Segment(3, 9, 12, 15), Segment(12, 13, 15, 21, 2.0))
    case = Case(14, 21, segments, 10, 8)
    inputs, upstream = inputs_of(case, 21, dtype)
    rest = (case.segments, case.segments, "relu", ATTENTION)
    got, want = (run(op, inputs, *rest, upstream=upstream) for op in (gated, reference.gated))
    assert got["d.G"].count_nonzero() and got["d.G"].norm() > 1e-3
    assert_close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("gate", [*GATES, ATTENTION], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_a_segments_bits_do_not_change_when_others_join(rows: int, dtype: torch.dtype, gate: Gate) -> None:
    own = Case(rows, 12, (Segment(0, rows, 0, 12, 4 / 3),), 576, 192)
    scores = 12 if gate == ATTENTION else 4
    inputs, upstream = inputs_of(own, scores, dtype)
    alone = run(gated, inputs, own.segments, Segments((Segment(0, rows, 0, scores),)), "gelu", gate, upstream=upstream)
    for poison in (None, float("nan")):
        results, mine = joined(own, inputs, upstream, gate, poison)
        assert_equal({name: results[name][mine[name]] for name in alone}, alone)


def joined(
    own: Case, inputs: dict[str, Tensor], upstream: Tensor, gate: Gate, poison: float | None
) -> tuple[Results, dict[str, slice]]:
    """Results beside a segment of the same shape before and another one after, and where one's own lie."""
    rows, dtype = own.rows, upstream.dtype
    segments = Segments(
        (Segment(0, rows, 0, 12, 0.5), Segment(rows, 2 * rows, 12, 24, 4 / 3), Segment(2 * rows, 2 * rows + 3, 24, 30))
    )
    edges = (12, 24, 30) if gate == ATTENTION else (4, 8, 11)
    lasts = zip((0, *edges[:-1]), edges, segments, strict=True)
    gates = Segments(tuple(Segment(s.start, s.stop, first, last) for first, last, s in lasts))
    others, slope = inputs_of(Case(2 * rows + 3, 30, (), own.d_in, own.d_out), edges[2], dtype, seed=1)
    batch, stack, scores = slice(rows, 2 * rows), slice(12, 24), slice(*edges[:2])
    mine = {"x": batch, "y": batch, "A": stack, "B": stack, "G": scores}
    for name, tensor in inputs.items():
        if poison is not None:
            others[name].fill_(poison)
        others[name][mine[name]] = tensor
    slope[batch] = upstream
    found = run(gated, others, segments, gates, "gelu", gate, upstream=slope)
    return found, {"out": batch} | {f"d.{name}": where for name, where in mine.items()}
