"""Runs an op forward and backward, and compares what came out with a reference, tensor by tensor and by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}  # relative L2
BF16_STEP = 2.0**-8  # one rounding to bf16
Results = dict[str, Tensor]
Inputs = Mapping[str, Tensor | None]
Op = Callable[..., Tensor]


def run(op: Op, inputs: Inputs, *rest: object, upstream: Tensor, dtype: torch.dtype | None = None) -> Results:
    """`out` and the gradients `d.NAME` of every input that is given, for the loss (out * upstream).sum().

    With `dtype` the inputs are cast to it first.
    """
    leaves = {
        name: None if tensor is None else tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()
        for name, tensor in inputs.items()
    }
    out = op(*leaves.values(), *rest)
    out.backward(upstream.to(out.dtype))
    gradients = {f"d.{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}
    return {"out": out.detach(), **gradients}


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, absolute where want is 0; NaN counts as infinitely far."""
    difference = (got.double() - want.double()).norm()
    error = float(difference / want.double().norm() if want.count_nonzero() else difference)
    return float("inf") if error != error else error


def errors(got: Results, want: Results) -> dict[str, float]:
    assert got.keys() == want.keys()
    assert all(got[name].shape == want[name].shape for name in want)
    return {name: relative(got[name], want[name]) for name in want}


def assert_close(got: Results, want: Results, tolerance: float) -> None:
    found = errors(got, want)
    assert all(error <= tolerance for error in found.values()), f"{found}, tolerance {tolerance}"


def assert_equal(got: Results, want: Results) -> None:
    """Bit for bit, but for the sign of zero."""
    assert got.keys() == want.keys()
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different, f"{different} differ: {errors(got, want)}"


def assert_as_good_as_steps(got: Results, steps: Results, truth: Results) -> None:
    """Each error at most 1.5 times that of the obvious steps in the same dtype, or one rounding."""
    mine, theirs = errors(got, truth), errors(steps, truth)
    worse = {name: (mine[name], theirs[name]) for name in truth if mine[name] > max(1.5 * theirs[name], BF16_STEP)}
    assert not worse, f"(error, error of the steps): {worse}"
