"""The nf4 op: bitsandbytes' levels and layout, and equal to its reference beside any segments."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from polygraft.kernels.common.segments import Segment, Segments
from polygraft.kernels.nf4 import reference
from polygraft.kernels.nf4.levels import LEVELS
from polygraft.kernels.nf4.op import dequantise, linear
from tests.kernels.compare import TOLERANCE, assert_close

CASES = {
    "no segment": (),
    "gaps, one row, odd ranks": (Segment(2, 3, 0, 5, 0.5), Segment(5, 69, 5, 22, 1.5), Segment(69, 70, 22, 23)),
    "empty segments": (Segment(0, 0, 0, 2), Segment(0, 9, 3, 3), Segment(9, 30, 3, 23, 2.0)),
}
D_IN, D_OUT, RANKS = 192, 70, 23


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("items", CASES.values(), ids=CASES.keys())
def test_equals_the_reference(items: tuple[Segment, ...], dtype: torch.dtype) -> None:
    inputs = tensors(70, dtype)
    got = linear(*inputs, Segments(items), "silu")
    assert_close({"out": got}, {"out": reference.linear(*inputs, Segments(items), "silu")}, TOLERANCE[dtype])


def test_levels_and_layout_are_those_of_bitsandbytes() -> None:
    W = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(1))
    packed, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")
    assert state.code.tolist() == pytest.approx(LEVELS, abs=1e-7)
    found = dequantise(packed.view(D_OUT, -1), state.absmax.view(D_OUT, -1), torch.float32)
    assert torch.equal(found, bnb.dequantize_4bit(packed, state))


def tensors(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, codes, absmax, A and B."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * size).to(dtype)

    codes = torch.randint(0, 256, (D_OUT, D_IN // 2), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(D_OUT, D_IN // 64, generator=generator)
    x, A = normal(rows, D_IN, size=1.0), normal(RANKS, D_IN, size=D_IN**-0.5)
    return x, codes, absmax, A, normal(RANKS, D_OUT, size=1.0)
