"""The library facts that packed-equals-alone rests on, on this machine's oneDNN, at SmolLM2's shapes."""

import pytest
import torch
from torch import Tensor

from polygraft.grafts.runtime.linears.choose import BLOCK
from polygraft.grafts.runtime.linears.plain import PlainLinear
from polygraft.grafts.runtime.padding import padded
from polygraft.kernels.common.matmul import segment_bmm

SHAPES = ((576, 960), (576, 3072), (1536, 576), (64, 96))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prepack", [True, False], ids=["prepacked", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_of_a_frozen_linear_ignores_how_many_rows_are_beside_it(
    shape: tuple[int, int], dtype: torch.dtype, prepack: bool
) -> None:
    d_in, d_out = shape
    linear = PlainLinear([torch.randn(d_out, d_in).to(dtype)], [None], prepack=prepack, block=BLOCK)
    x, dy = torch.randn(600, d_in).to(dtype), torch.randn(600, d_out).to(dtype)
    forward, backward = linear.product(x), linear.transposed_product(dy)
    for start, rows in ((0, 16), (3, 24), (7, 61), (40, 128), (101, 200), (77, 500)):
        height = padded(rows)
        assert torch.equal(linear.product(_rows(x, start, rows, height))[:rows], forward[start : start + rows])
        assert torch.equal(
            linear.transposed_product(_rows(dy, start, rows, height))[:rows], backward[start : start + rows]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [(37, 576, 16), (37, 16, 960), (16, 37, 576), (100, 1536, 64), (2, 96, 3)], ids=str)
def test_a_segments_product_is_the_same_whatever_the_other_segments(
    size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, inner, width = size
    left, right = torch.randn(9, rows, inner).to(dtype), torch.randn(9, width, inner).to(dtype).transpose(1, 2)
    together = segment_bmm(left, right)
    for count in (1, 2, 5, 8):
        assert torch.equal(segment_bmm(left[:count], right[:count]), together[:count])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attentions_products_are_the_same_whatever_the_other_sequences(dtype: torch.dtype) -> None:
    kv_heads, group, width = 3, 3, 64
    for length in (32, 80, 256, 512):
        keys = torch.randn(4 * kv_heads, length, width).to(dtype)
        queries = torch.randn(4 * kv_heads, group * length, width).to(dtype)
        weights = torch.randn(4 * kv_heads, group * length, length).to(dtype)
        for left, right in ((queries, keys.transpose(1, 2)), (weights, keys), (weights.transpose(1, 2), queries)):
            together = torch.bmm(left, right)
            assert torch.equal(torch.bmm(left[:kv_heads], right[:kv_heads]), together[:kv_heads])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_weights_come_back_as_they_were(dtype: torch.dtype) -> None:
    weight = torch.randn(96, 64).to(dtype)
    assert torch.equal(PlainLinear([weight[:40], weight[40:]], [None, None]).weight(), weight)


def _rows(x: Tensor, start: int, rows: int, height: int) -> Tensor:
    """Rows of x, padded with zeros to `height`."""
    out = x.new_zeros(height, x.shape[1])
    out[:rows] = x[start : start + rows]
    return out
