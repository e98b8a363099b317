"""Runs the branch op's Triton kernels in the interpreter, on CPU tensors, and prints a JSON line for each check.

A process of its own, since TRITON_INTERPRET is read where kernels are defined. The interpreter multiplies bf16 as if it
were integers, so float16 stands for the half types here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from polygraft.kernels.branch import gpu, reference
from polygraft.kernels.branch.activation import ACTIVATIONS
from polygraft.kernels.common.segments import Segment
from tests.kernels.cases import CASES, Case, Joined, branch_inputs
from tests.kernels.compare import assert_close, assert_equal, run
from tests.kernels.poison import poison_uninitialised

TILED = Case(
    140, 110, (Segment(0, 70, 0, 66, 0.5), Segment(70, 71, 66, 83), Segment(71, 136, 83, 106, 4 / 3)), 70, 130
)  # more than one tile of rows, of ranks and of features
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}


def equals_reference(
    case: Case, dtype: torch.dtype, act: str = "identity", tolerance: float | None = None, *, biased: bool = False
) -> None:
    inputs, upstream = branch_inputs(case, dtype, biased=biased)
    got = run(called(gpu.branch), inputs, case.segments, act, upstream=upstream)
    want = run(called(reference.branch), inputs, case.segments, act, upstream=upstream, dtype=torch.float64)
    want = {name: want.get(name, torch.zeros_like(got[name])) for name in got}
    assert_close(got, want, tolerance or TOLERANCE[dtype])


def called(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op with the hidden biases, where there are any, as its last input."""

    def call(x: Tensor, y: Tensor, A: Tensor, B: Tensor, *rest: object) -> Tensor:
        *biases, segments, act = rest
        return op(x, y, A, B, segments, act, *biases)

    return call


def takes_strided_rows_and_gradients() -> None:
    case = CASES["mixed ranks"]
    inputs, upstream = branch_inputs(case, torch.float32)

    def strided(x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> Tensor:
        wide = torch.cat([x, y], 1)
        return gpu.branch(wide[:, : case.d_in], wide[:, case.d_in :], A.T.contiguous().T, B, case.segments)

    got = run(strided, inputs, upstream=upstream.T.contiguous().T)
    assert_close(got, run(reference.branch, inputs, case.segments, upstream=upstream), TOLERANCE[torch.float32])


def only_what_is_asked_for_gets_a_gradient() -> None:
    case = CASES["mixed ranks"]
    inputs, upstream = branch_inputs(case, torch.float32)
    inputs["x"].requires_grad_()
    gpu.branch(inputs["x"], inputs["y"], inputs["A"], inputs["B"], case.segments).backward(upstream)
    want = run(reference.branch, inputs, case.segments, upstream=upstream)["d.x"]
    assert inputs["x"].grad is not None and all(inputs[name].grad is None for name in "yAB")
    assert_close({"d.x": inputs["x"].grad}, {"d.x": want}, TOLERANCE[torch.float32])


def a_segment_is_a_function_of_itself_alone(dtype: torch.dtype, value: float, *, biased: bool = False) -> None:
    own = Case(21, 17, (Segment(0, 21, 0, 17, 4 / 3),))
    inputs, upstream = branch_inputs(own, dtype, biased=biased)
    alone = run(called(gpu.branch), inputs, own.segments, "silu", upstream=upstream)
    joined = Joined(own, [(5, 17, 1.0)], [(1, 3, 0.5), (70, 40, 2.0)], dtype, biased=biased)
    joined.fill_others(value)
    results = run(called(gpu.branch), joined.inputs, joined.segments, "silu", upstream=joined.upstream)
    assert_equal(joined.own(results), alone)


CHECKS: dict[str, Callable[[], None]] = {
    **{f"float32, {name}": lambda case=case: equals_reference(case, torch.float32) for name, case in CASES.items()},  # type: ignore[misc]
    **{f"float64, {act}": lambda act=act: equals_reference(CASES["mixed ranks"], torch.float64, act)  # type: ignore[misc]
       for act in ACTIVATIONS if act != "tanh"},
    "float32, tanh": lambda: equals_reference(CASES["mixed ranks"], torch.float32, "tanh"),
    "float64, tanh": lambda: equals_reference(CASES["mixed ranks"], torch.float64, "tanh", 1e-9),  # a series near 0
    "float32, many tiles": lambda: equals_reference(TILED, torch.float32, "gelu"),
    "float16, many tiles": lambda: equals_reference(TILED, torch.float16, "gelu"),
    **{f"hidden biases, {name}": lambda case=case: equals_reference(case, torch.float32, "gelu", biased=True)  # type: ignore[misc]
       for name, case in CASES.items()},
    "hidden biases, float64": lambda: equals_reference(CASES["mixed ranks"], torch.float64, "silu", biased=True),
    "hidden biases, float16": lambda: equals_reference(TILED, torch.float16, "gelu", biased=True),
    **{f"hidden biases, alone and joined by {value}":
       lambda value=value: a_segment_is_a_function_of_itself_alone(torch.float16, value, biased=True)  # type: ignore[misc]
       for value in (1.0, float("nan"))},
    "strided rows and gradients": takes_strided_rows_and_gradients,
    "only the gradient asked for": only_what_is_asked_for_gets_a_gradient,
    **{f"alone and joined by {value} in {dtype}":
       lambda dtype=dtype, value=value: a_segment_is_a_function_of_itself_alone(dtype, value)  # type: ignore[misc]
       for dtype in (torch.float32, torch.float16) for value in (1.0, float("nan"))},
}  # fmt: skip


def put_language_once(patch: pytest.MonkeyPatch) -> None:
    """The interpreter's functions stand in the language's place from the first program on. By itself it puts them there
    at every launch and at every call of one program by another, which takes longer than the programs."""
    put, done = interpreter._patch_lang, set[str]()

    def put_once(program: Callable[..., None]) -> interpreter._LangPatchScope:
        language = {value.__name__ for value in program.__globals__.values() if value is tl or value is tl.core}
        if not language <= done:
            done.update(language)
            put(program)
        return interpreter._LangPatchScope()  # which has nothing to put back

    patch.setattr(interpreter, "_patch_lang", put_once)


def main(checks: Mapping[str, Callable[[], None]]) -> None:
    torch.set_num_threads(1)  # numpy does the work
    patch = pytest.MonkeyPatch()
    poison_uninitialised(patch)
    put_language_once(patch)
    for name, check in checks.items():
        try:
            check()
            failure = ""
        except AssertionError as error:
            failure = str(error) or "failed"
        print(json.dumps({"check": name, "failure": failure}), flush=True)


if __name__ == "__main__":
    main(CHECKS)
