"""Runs a quantised linear and the branches beside it through the Triton kernels in the interpreter, on CPU tensors that
say they are on a GPU, and prints a JSON line for each check (tests/kernels/interpreted.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TypeVar

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.runtime.fused import FusedBranches, RoutedBranches
from polygraft.grafts.runtime.linears.nf4 import Nf4Linear
from polygraft.grafts.runtime.projection import project
from polygraft.grafts.runtime.stack import StackSlice, StackSlices
from polygraft.kernels.branch import reference
from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.dense.op import FusedBranch
from polygraft.kernels.nf4 import gpu
from tests.kernels.compare import assert_close
from tests.kernels.interpreted import TOLERANCE, main

T = TypeVar("T")
D_IN, WIDTHS, ROWS, RANK = 128, (40, 24, 24), 21, 5
DISJOINT = (Segment(1, 2, 0, RANK, 0.5), Segment(4, 20, RANK, 2 * RANK, 2.0))
MEETING = (Segment(0, 12, 0, RANK), Segment(5, 21, RANK, 2 * RANK, 0.3))
LISTS: dict[StackSlices, tuple[Segment, ...]] = {
    StackSlices(tuple(StackSlice(graft, s.first, s.last) for graft, s in enumerate(items, start))): items
    for start, items in ((0, DISJOINT), (2, MEETING))
}
FIRST, SECOND = LISTS  # grafts whose spans are apart, and grafts whose spans meet
# (branches as (member, grafts, activation); the widths of the products that they are asked for with)
CASES: dict[str, tuple[list[tuple[int, StackSlices, str]], list[int]]] = {
    "of two members": ([(0, FIRST, "silu"), (1, FIRST, "identity")], list(WIDTHS)),
    "two of a member": ([(2, FIRST, "silu"), (2, FIRST, "identity"), (0, SECOND, "gelu")], list(WIDTHS)),
    "that meet": ([(0, SECOND, "gelu")], [sum(WIDTHS)]),
}


class OnGpu(Tensor):
    """A tensor of the CPU that ops take for one of a GPU."""

    is_cuda = True


def a_bare_linear_is_its_dense_product(dtype: torch.dtype) -> None:
    linear, x = made(dtype)
    want = F.linear(x.double(), linear.weight().double())
    for product in (linear.product, linear.product_alone):
        y, launches = counted(partial(product, on_gpu(x)))
        assert launches == [sum(WIDTHS)]
        assert_close({"y": plain(y)}, {"y": want}, TOLERANCE[dtype])


def branches_are_added_in_the_product_or_after_it(case: str, dtype: torch.dtype) -> None:
    (places, launches), (linear, x) = CASES[case], made(dtype)
    items = [(FusedBranch(member, *matrices(member, dtype), act), slices) for member, slices, act in places]
    want = list(F.linear(x.double(), linear.weight().double()).split_with_sizes(WIDTHS, dim=1))
    for b, slices in items:
        segments = Segments(LISTS[slices])
        want[b.member] = reference.branch(x.double(), want[b.member], b.A.double(), b.B.double(), segments, b.act)

    with torch.inference_mode():
        got, found = counted(lambda: project(on_gpu(x), linear, routed(*items)))
    assert found == launches
    for product, expected in zip(got, want, strict=True):
        assert_close({"y": plain(product)}, {"y": expected}, TOLERANCE[dtype])


def training_takes_the_product_and_its_gradient(dtype: torch.dtype) -> None:
    linear, x = made(dtype)
    b = FusedBranch(1, normal(2 * RANK, D_IN).to(dtype), normal(2 * RANK, WIDTHS[1]).to(dtype), "gelu")
    leaf = on_gpu(x).requires_grad_()
    products = project(leaf, linear, routed((b, FIRST)))
    slopes = [normal(ROWS, width).to(dtype) for width in WIDTHS]
    (gradient,) = torch.autograd.grad(products, leaf, [on_gpu(slope) for slope in slopes])
    truth = x.double().requires_grad_()
    want = list(F.linear(truth, linear.weight().double()).split_with_sizes(WIDTHS, dim=1))
    want[1] = reference.branch(truth, want[1], b.A.double(), b.B.double(), Segments(DISJOINT), "gelu")
    (expected,) = torch.autograd.grad(want, truth, [slope.double() for slope in slopes])
    assert_close({"dx": plain(gradient)}, {"dx": expected}, TOLERANCE[dtype])


def matrices(member: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B of two grafts."""
    return normal(2 * RANK, D_IN).to(dtype) / D_IN**0.5, normal(2 * RANK, WIDTHS[member]).to(dtype)


def routed(*items: tuple[FusedBranch, StackSlices]) -> RoutedBranches:
    return FusedBranches(items).routed(lambda slices: Segments(LISTS[slices]))


def made(dtype: torch.dtype) -> tuple[Nf4Linear, Tensor]:
    torch.manual_seed(0)
    weights = [0.1 * normal(width, D_IN).to(dtype) for width in WIDTHS]
    return Nf4Linear(weights, [None] * len(weights)), normal(ROWS, D_IN).to(dtype)


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64)


def on_gpu(x: Tensor) -> Tensor:
    return x.as_subclass(OnGpu)


def plain(x: Tensor) -> Tensor:
    return x.detach().as_subclass(Tensor)


def counted(call: Callable[[], T]) -> tuple[T, list[int]]:
    """What the call gives, and the outputs of every nf4 product that it asks for."""
    found, kernel = [], gpu.linear

    def seen(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
        found.append(len(codes))
        return kernel(x, codes, *rest)  # type: ignore[arg-type]

    gpu.linear = seen  # type: ignore[assignment]
    try:
        return call(), found
    finally:
        gpu.linear = kernel


DTYPES = (torch.float32, torch.float16)
CHECKS: dict[str, Callable[[], None]] = {
    **{f"bare, {dtype}": partial(a_bare_linear_is_its_dense_product, dtype) for dtype in DTYPES},
    **{f"branches {case}, {dtype}": partial(branches_are_added_in_the_product_or_after_it, case, dtype)
       for case in CASES for dtype in DTYPES},
    "training": partial(training_takes_the_product_and_its_gradient, torch.float32),
}  # fmt: skip

if __name__ == "__main__":
    main(CHECKS)
