"""The norm op: row norms of W + s B A without the product, equal to those of the product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polygraft.kernels.norm import reference
from polygraft.kernels.norm.op import row_norm
from tests.kernels.compare import BF16_STEP, TOLERANCE, relative

SHAPES = ((1, 1, 1), (63, 65, 5), (33, 7, 13), (128, 64, 16))  # out, in, rank


@pytest.mark.parametrize("scale", [1.0, -0.5, 0.0, 16 / 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_norms_of_the_materialised_sum(
    shape: tuple[int, int, int], dtype: torch.dtype, scale: float
) -> None:
    W, A, B = (tensor.to(dtype) for tensor in weights(*shape))
    assert relative(op(W, A, B, scale), reference.row_norm(W, A, B, scale)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_weights_lose_only_what_the_product_with_w_loses(shape: tuple[int, int, int]) -> None:
    W, A, B = (tensor.to(torch.bfloat16) for tensor in weights(*shape))
    got = op(W, A, B, 2.0)
    assert got.dtype == torch.float32
    assert relative(got, reference.row_norm(W.double(), A.double(), B.double(), 2.0)) <= BF16_STEP


def test_a_start_of_zero_gives_the_norms_of_w_itself() -> None:
    W, A, B = weights(63, 65, 5)
    assert torch.equal(op(W, A, torch.zeros_like(B), 2.0), W.square().sum(1).sqrt())


def test_rows_that_cancel_are_zero_and_not_nan() -> None:
    _, A, B = weights(9, 65, 5)
    W = -(B.T @ A)
    got = op(W.float(), A.float(), B.float(), 1.0)
    assert got.isfinite().all()
    assert (got <= 1e-2 * W.norm(dim=1)).all()  # the square root of float32's rounding


def test_is_kept_out_of_the_gradient() -> None:
    W, A, B = weights(9, 7, 5)
    assert not op(W, A.requires_grad_(), B.requires_grad_(), 1.0).requires_grad


def op(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(W.dtype, torch.float32)
    return row_norm(W.to(wide).square().sum(1), A @ W.T, A, B, scale)


def weights(d_out: int, d_in: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """W, A, B in float64, all of entries about 1 / sqrt(in)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((d_out, d_in), (rank, d_in), (rank, d_out))
    W, A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) / d_in**0.5 for shape in shapes)
    return W, A, B
