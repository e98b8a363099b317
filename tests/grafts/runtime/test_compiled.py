"""The frozen linear that the dense op multiplies for: the same function as torch's, and rows that are their own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from polygraft.grafts.runtime.fused import FusedBranches
from polygraft.grafts.runtime.linears.choose import frozen_linear
from polygraft.grafts.runtime.linears.compiled import CompiledLinear
from polygraft.grafts.runtime.linears.plain import PlainLinear
from polygraft.grafts.runtime.linears.protocol import FrozenLinear
from polygraft.grafts.runtime.projection import project
from polygraft.grafts.runtime.route import Span, work_list
from polygraft.grafts.runtime.stack import StackSlice, StackSlices
from polygraft.kernels.dense import op
from tests.compiled import compiled
from tests.kernels.compare import relative

INNER, WIDTHS = 576, (192, 64)
SPANS = (Span(0, 23, 0), Span(23, 70, 1), Span(70, 100, 0, 0.5))
SLICES = StackSlices((StackSlice(0, 0, 8, 2.0), StackSlice(1, 8, 28, 0.7)))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def weights() -> list[Tensor]:
    return [normal(width, INNER) / INNER**0.5 for width in WIDTHS]


def branches(act: str) -> FusedBranches:
    return FusedBranches(
        tuple(
            (
                op.FusedBranch(
                    member,
                    (normal(28, INNER) / INNER**0.5).requires_grad_(),
                    normal(28, width).requires_grad_(),
                    act,
                ),
                SLICES,
            )
            for member, width in enumerate(WIDTHS)
        )
    )


def trained(linear: FrozenLinear, fused: FusedBranches, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The products, and the gradients of x and of every A and B."""
    x = x.clone().requires_grad_()
    leaves = [x, *(w for b, _ in fused.items for w in (b.A, b.B))]
    y = torch.cat(project(x, linear, fused.routed(lambda slices: work_list(SPANS, slices))), dim=1)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@compiled
@pytest.mark.parametrize("act", op.ACTIVATIONS)
def test_training_through_it_is_training_through_torchs(act: str) -> None:
    W, fused, x, dy = weights(), branches(act), normal(100, INNER), normal(100, sum(WIDTHS))
    ours = trained(CompiledLinear(W, [None, None], prepack=False), fused, x, dy)
    theirs = trained(PlainLinear(W, [None, None], prepack=False), fused, x, dy)
    assert max(map(relative, ours, theirs)) < 1e-2


@compiled
@pytest.mark.parametrize("act", op.ACTIVATIONS)
def test_prepacked_and_plain_weights_train_the_same_bits(act: str) -> None:
    W, fused, x, dy = weights(), branches(act), normal(100, INNER), normal(100, sum(WIDTHS))
    first, second = (trained(CompiledLinear(W, [None, None], prepack=p), fused, x, dy) for p in (True, False))
    assert all(map(torch.equal, first, second))


@compiled
@pytest.mark.parametrize("act", op.MASK_DERIVATIVE)
def test_what_is_served_and_evaluated_is_what_is_trained(act: str) -> None:
    W, fused, x, dy = weights(), branches(act), normal(100, INNER), normal(100, sum(WIDTHS))
    linear = CompiledLinear(W, [None, None], prepack=False)
    with torch.inference_mode():
        served = torch.cat(project(x, linear, fused.routed(lambda slices: work_list(SPANS, slices))), dim=1)
    assert torch.equal(served, trained(linear, fused, x, dy)[0])


@compiled
@pytest.mark.parametrize("shape", [(576, 960), (576, 3072), (1536, 576), (64, 96)], ids=str)
def test_a_row_ignores_how_many_rows_are_beside_it(shape: tuple[int, int]) -> None:
    d_in, d_out = shape
    linear = CompiledLinear([normal(d_out, d_in)], [None], prepack=False)
    x, dy = normal(600, d_in), normal(600, d_out)
    forward, backward = linear.product(x), linear.transposed_product(dy)
    for start, rows in ((0, 1), (3, 24), (7, 61), (40, 128), (77, 500)):
        own = slice(start, start + rows)
        assert torch.equal(linear.product(x[own]), forward[own])
        assert torch.equal(linear.transposed_product(dy[own]), backward[own])


@compiled
@pytest.mark.parametrize("prepack", [True, False], ids=["packed", "plain"])
def test_weights_come_back_as_they_were(prepack: bool) -> None:
    W = weights()
    assert torch.equal(CompiledLinear(W, [None, None], prepack=prepack).weight(), torch.cat(W))


def chosen(W: Sequence[Tensor]) -> type[FrozenLinear]:
    return type(frozen_linear(W, [None] * len(W), prepack=True, block=None))


@compiled
def test_it_is_chosen_for_what_it_can_multiply() -> None:
    assert chosen(weights()) is CompiledLinear
    assert chosen([w.float() for w in weights()]) is PlainLinear
    assert chosen([normal(50, INNER)]) is chosen([normal(64, 50)]) is PlainLinear


def test_without_the_library_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "library", lambda: None)
    assert chosen(weights()) is PlainLinear
