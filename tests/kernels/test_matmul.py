"""The batched matmuls: equal to torch's, and every member's bits its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polygraft.kernels.common.matmul import add_segment_bmm_, segment_bmm
from tests.kernels.compare import TOLERANCE, relative

Product = Callable[[Tensor, Tensor], Tensor]
SEGMENT_SHAPES = (
    *((1, 65, 65), (2, 33, 576), (5, 3, 576), (7, 576, 5), (65, 1536, 16), (128, 1024, 65)),
    *((8, 65, 1), (33, 65, 8), (65, 17, 33)),
)
ATTENTION_SHAPES = ((16, 16, 16), (48, 64, 16), (32, 8, 32), (64, 64, 64))  # which the kv op gives to torch.bmm
SHAPES = [(segment_bmm, shape) for shape in SEGMENT_SHAPES] + [(torch.bmm, shape) for shape in ATTENTION_SHAPES]
MEMBERS = 11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("product", "shape"), SHAPES)
def test_equals_the_matmul_of_every_member(product: Product, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for a, b in layouts(shape, dtype):
        assert relative(product(a, b), a.double() @ b.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("product", "shape"), SHAPES)
def test_a_members_bits_depend_neither_on_the_others_nor_on_its_address(
    product: Product, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    for a, b in layouts(shape, dtype):
        together = product(a, b)
        for low, high in ((0, 1), (3, 4), (1, 3), (2, 6), (4, 8), (7, 11), (8, 11), (1, 10)):
            alone = product(a[low:high].clone(), b[low:high].clone())  # clones begin at 64 bytes, members do not
            assert torch.equal(together[low:high], alone), (low, high)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_products_are_written_and_added_in_place(dtype: torch.dtype) -> None:
    a, b = next(iter(layouts((5, 3, 7), dtype)))
    want = a.double() @ b.double()
    out = torch.full_like(want, float("nan"), dtype=dtype)
    assert segment_bmm(a, b, out=out) is out
    assert relative(out, want) <= TOLERANCE.get(dtype, 2**-8)
    total = torch.ones_like(out)
    add_segment_bmm_(total, a, b)
    assert relative(total, want + 1) <= TOLERANCE.get(dtype, 2**-8)


def layouts(shape: tuple[int, int, int], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Members plain, with b transposed and with a transposed: the layouts that forward and backward use."""
    m, k, p = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(MEMBERS, m, k, generator=generator).to(dtype)
    b = torch.randn(MEMBERS, k, p, generator=generator).to(dtype)
    return [(a, b), (a, b.mT.contiguous().mT), (a.mT.contiguous().mT, b)]
