"""The branch op on CPU: equal to its reference, and every segment a function of itself alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polygraft.kernels.branch import cost, reference
from polygraft.kernels.branch.activation import ACTIVATIONS
from polygraft.kernels.branch.op import branch
from polygraft.kernels.common.segments import Segment, Segments
from tests.kernels.cases import CASES, Case, Joined, branch_inputs
from tests.kernels.compare import TOLERANCE, assert_as_good_as_steps, assert_close, assert_equal, run

DTYPES = (torch.float64, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_equal_the_reference(case: Case, dtype: torch.dtype) -> None:
    inputs, upstream = branch_inputs(case, dtype)
    got = run(branch, inputs, case.segments, upstream=upstream)
    want = run(reference.branch, inputs, case.segments, upstream=upstream)
    want = {name: want.get(name, torch.zeros_like(inputs[name[2:]])) if name != "out" else want[name] for name in got}
    assert_close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_equals_the_reference(act: str, dtype: torch.dtype) -> None:
    case = CASES["mixed ranks"]
    inputs, upstream = branch_inputs(case, dtype)
    got = run(branch, inputs, case.segments, act, upstream=upstream)
    assert_close(got, run(reference.branch, inputs, case.segments, act, upstream=upstream), TOLERANCE[dtype])


@pytest.mark.parametrize("act", ["identity", "gelu"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_hidden_biases_equal_the_reference(case: Case, act: str) -> None:
    inputs, upstream = branch_inputs(case, torch.float64)
    inputs["a"] = torch.linspace(-1, 1, case.stack_rows, dtype=torch.float64).unsqueeze(1)

    def biased(  # noqa: PLR0913
        op: Callable[..., Tensor], x: Tensor, y: Tensor, A: Tensor, B: Tensor, a: Tensor, segments: Segments
    ) -> Tensor:
        return op(x, y, A, B, segments, act, a)

    got = run(partial(biased, branch), inputs, case.segments, upstream=upstream)
    want = run(partial(biased, reference.branch), inputs, case.segments, upstream=upstream)
    assert_close(got, {name: want.get(name, torch.zeros(1)).expand_as(got[name]) for name in got}, 1e-12)
    with torch.no_grad():
        assert_close({"out": biased(branch, **inputs, segments=case.segments)}, {"out": got["out"]}, 1e-12)


def test_an_unknown_activation_is_refused() -> None:
    case = CASES["mixed ranks"]
    inputs, _ = branch_inputs(case, torch.float32)
    with pytest.raises(KeyError, match="swish"):
        branch(inputs["x"], inputs["y"], inputs["A"], inputs["B"], case.segments, "swish")


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bf16_is_as_good_as_the_obvious_steps(case: Case, act: str) -> None:
    inputs, upstream = branch_inputs(case, torch.bfloat16)
    got = run(branch, inputs, case.segments, act, upstream=upstream)
    steps = run(in_steps, inputs, case.segments, act, upstream=upstream)
    truth = run(reference.branch, inputs, case.segments, act, upstream=upstream, dtype=torch.float64)
    if not case.segments.runs:
        got, steps, truth = ({"out": results["out"]} for results in (got, steps, truth))
    assert_as_good_as_steps(got, steps, truth)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, stack_rows = draw(st.integers(1, 24)), draw(st.integers(1, 12))

    def bounds(limit: int) -> tuple[int, int]:
        low, high = sorted(draw(st.lists(st.integers(0, limit), min_size=2, max_size=2)))
        return low, high

    scales = st.sampled_from([1.0, 0.5, -2.0, 1 / 3, 0.0])
    items = tuple(Segment(*bounds(rows), *bounds(stack_rows), draw(scales)) for _ in range(draw(st.integers(0, 5))))
    return Case(rows, stack_rows, items, d_in=draw(st.integers(1, 9)), d_out=draw(st.integers(1, 9)))


@settings(max_examples=60)
@given(cases(), st.sampled_from(sorted(ACTIVATIONS)))
def test_any_segments_equal_the_reference(case: Case, act: str) -> None:
    inputs, upstream = branch_inputs(case, torch.float64)
    got = run(branch, inputs, case.segments, act, upstream=upstream)
    want = run(reference.branch, inputs, case.segments, act, upstream=upstream)
    want = {name: want.get(name, torch.zeros_like(got[name])) for name in got}
    assert_close(got, want, TOLERANCE[torch.float64])


def test_gradients_that_nobody_asks_for_are_not_computed() -> None:
    case = CASES["mixed ranks"]
    inputs, upstream = branch_inputs(case, torch.float32)
    inputs["A"].requires_grad_()
    branch(inputs["x"], inputs["y"], inputs["A"], inputs["B"], case.segments).backward(upstream)
    want = run(reference.branch, inputs, case.segments, upstream=upstream)
    assert inputs["A"].grad is not None
    assert_close({"d.A": inputs["A"].grad}, {"d.A": want["d.A"]}, TOLERANCE[torch.float32])
    assert all(inputs[name].grad is None for name in "xyB")


def test_columns_of_a_wider_tensor_and_a_transposed_gradient_are_taken_as_they_lie() -> None:
    case = CASES["mixed ranks"]
    inputs, upstream = branch_inputs(case, torch.float64)
    wide = torch.randn(case.rows, case.d_in + case.d_out + 3, dtype=torch.float64)
    wide[:, 1 : 1 + case.d_in], wide[:, 2 + case.d_in : 2 + case.d_in + case.d_out] = inputs["x"], inputs["y"]

    def from_columns(wide: Tensor, A: Tensor, B: Tensor, segments: Segments) -> Tensor:
        x, y = wide[:, 1 : 1 + case.d_in], wide[:, 2 + case.d_in : 2 + case.d_in + case.d_out]
        return branch(x, y, A, B, segments)

    strided = {"wide": wide, "A": inputs["A"], "B": inputs["B"]}
    got = run(from_columns, strided, case.segments, upstream=upstream.T.contiguous().T)
    want = run(reference.branch, inputs, case.segments, upstream=upstream)
    found = {name: got[name] for name in ("out", "d.A", "d.B")}
    found["d.x"] = got["d.wide"][:, 1 : 1 + case.d_in]
    assert_close(found, {name: want[name] for name in found}, TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_stacked_equals_segmented(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = branch_inputs(case, dtype)
    outs = []
    for pays in (True, False):
        monkeypatch.setattr(cost, "stacking_pays", lambda *_, pays=pays: pays)
        outs.append({"out": branch(*inputs.values(), case.segments, "silu")})  # type: ignore[arg-type,call-arg]
    if dtype == torch.bfloat16:
        truth = reference.branch(*(tensor.double() for tensor in inputs.values()), case.segments, "silu")  # type: ignore[arg-type,call-arg]
        assert_as_good_as_steps(outs[0], outs[1], {"out": truth})
    else:
        assert_close(outs[0], outs[1], TOLERANCE[dtype])


def test_stacked_keeps_factors_that_bf16_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "stacking_pays", lambda *_: True)
    segments = Segments((Segment(0, 64, 0, 1, 1 + 2**-8),))  # bf16 rounds it to 1
    ones = torch.ones(64, 1, dtype=torch.bfloat16)
    out = branch(ones * 1.5, ones * 0, ones[:1], ones[:1], segments)
    assert out.unique().tolist() == [1.5078125]


def test_stacked_rows_do_not_see_what_is_not_finite_in_foreign_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "stacking_pays", lambda *_: True)
    case = CASES["one-row segments"]
    inputs, _ = branch_inputs(case, torch.float32)
    clean = branch(*inputs.values(), case.segments)  # type: ignore[arg-type,call-arg]
    inputs["x"][4] = float("inf")
    assert torch.equal(branch(*inputs.values(), case.segments)[:4], clean[:4])  # type: ignore[arg-type,call-arg]


ROWS_AND_RANKS = ((1, 1), (1, 8), (2, 3), (7, 5), (16, 16), (63, 8), (65, 33))
WIDTHS = ((576, 192), (33, 47))
SCALE = 4 / 3


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rows_and_rank", ROWS_AND_RANKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_segments_bits_do_not_change_when_others_join(
    dtype: torch.dtype, rows_and_rank: tuple[int, int], widths: tuple[int, int]
) -> None:
    rows, rank = rows_and_rank
    own = Case(rows, rank, (Segment(0, rows, 0, rank, SCALE),), *widths)
    inputs, upstream = branch_inputs(own, dtype)
    alone = run(branch, inputs, own.segments, "silu", upstream=upstream)
    for before, after in (
        ([], [(rows, rank, SCALE)]),  # the same shape and factor: one batched product
        ([(rows, rank, 2.0)] * 2, [(rows, rank, 0.1)] * 3),  # the same shape, other factors
        ([(3, 7, 1.0)], [(5, rank, 1.0), (rows, 2, 1.0)]),  # other shapes; every address moves
    ):
        joined = Joined(own, before, after, dtype)
        results = run(branch, joined.inputs, joined.segments, "silu", upstream=joined.upstream)
        assert_equal(joined.own(results), alone)


def test_evaluation_between_steps_gives_the_bits_of_a_step_whoever_joins() -> None:
    own = Case(9, 4, (Segment(0, 9, 0, 4, SCALE),), 576, 576)
    inputs, upstream = branch_inputs(own, torch.bfloat16)
    alone = run(branch, inputs, own.segments, "silu", upstream=upstream)["out"]
    joined = Joined(own, [], [(9, 4, 1.0)] * 12, torch.bfloat16)  # one product over the whole stack would be cheaper
    joined.inputs["B"][4:] = float("nan")
    joined.inputs["A"].requires_grad_()
    with torch.no_grad():
        out = branch(*joined.inputs.values(), joined.segments, "silu")  # type: ignore[arg-type,call-arg]
    assert torch.equal(out[:9], alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["x", "y", "A", "B", "upstream"])
def test_what_is_not_finite_stays_in_its_segment(where: str, dtype: torch.dtype, value: float) -> None:
    own = Case(5, 3, (Segment(0, 5, 0, 3, SCALE),))
    inputs, upstream = branch_inputs(own, dtype)
    alone = run(branch, inputs, own.segments, "gelu", upstream=upstream)
    joined = Joined(own, [(5, 3, 1.0), (2, 4, 0.5)], [(5, 3, 1.0), (2, 4, 0.5)], dtype)
    joined.fill_others(value, where)
    results = run(branch, joined.inputs, joined.segments, "gelu", upstream=joined.upstream)
    assert_equal(joined.own(results), alone)


def in_steps(x: Tensor, y: Tensor, A: Tensor, B: Tensor, segments: Segments, act: str) -> Tensor:
    """What one would write for each segment, rounding after every step."""
    out = y + 0
    for s in segments:
        hidden = ACTIVATIONS[act](x[s.start : s.stop] @ A[s.first : s.last].T) * s.scale
        out = torch.cat([out[: s.start], out[s.start : s.stop] + hidden @ B[s.first : s.last], out[s.stop :]])
    return out
